import json

import pytest

from natgrad.experiments.contestants import Record
from natgrad.experiments.curves import curve, read_run, recorded
from natgrad.experiments.runfolder import RunFolder
from natgrad.experiments.settings import Settings
from natgrad.experiments.table import sheets, threshold_sheet
from natgrad.experiments.thresholds import ADAM_BEST_2017, BEST_2017, rows


def make(folder, settings, **losses):
    """A run folder with the given test losses; Adam's steps take 2 seconds, all others' 5."""
    RunFolder.create(folder, settings)
    lines = []
    for name, values in losses.items():
        for step, loss in enumerate(values):
            line = {"optimizer": name, "step": step, "train_loss": 1.0, "test_loss": loss, "diagnostics": {}}
            lines.append({**line, "seconds": step * (2.0 if name == "adam" else 5.0)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run(folder)


def at(table, threshold):
    return {row.label: row for row in table if row.threshold == threshold}


def test_thresholds_reached_by_both(tiny, tmp_path):
    run = make(tmp_path, tiny(optimizers=("adam", "sgd")), adam=[90, 60, 40, 29, 19], sgd=[90, 30.0, 25])
    table = rows([run])
    assert list(dict.fromkeys(row.threshold for row in table)) == [50, 30, 20]
    fifty = at(table, 50)
    assert (fifty["Adam"].cost.steps, fifty["Adam"].cost.seconds) == (2, 4.0)
    assert (fifty["SGD"].cost.steps, fifty["SGD"].cost.seconds) == (1, 5.0)
    assert (fifty["SGD"].steps_ratio, fifty["SGD"].seconds_ratio) == (2.0, 0.8)
    # Reaching exactly counts.
    assert at(table, 30)["SGD"].cost.steps == 1
    assert at(table, 30)["SGD"].steps_ratio == 3.0


def test_a_contestant_that_never_got_there_has_no_ratio(tiny, tmp_path):
    run = make(tmp_path, tiny(optimizers=("adam", "sgd")), adam=[90, 19], sgd=[90, 30, 25])
    row = at(rows([run]), 20)["SGD"]
    assert row.cost.is_bound
    assert (row.cost.steps, row.cost.seconds) == (2, 10.0)
    assert (row.steps_ratio, row.seconds_ratio) == (None, None)


def test_the_length_of_adams_run_bounds_the_ratio_on_other_problems(tiny, tmp_path):
    run = make(tmp_path, tiny(optimizers=("adam", "sgd")), adam=[90, 60, 55, 54, 53], sgd=[90, 40])
    row = at(rows([run]), 50)["SGD"]
    assert row.adam.is_bound
    assert not row.adam.is_recorded
    assert (row.steps_ratio, row.seconds_ratio) == (4.0, 8.0 / 5.0)
    cells = next(line for line in threshold_sheet(rows([run])).lines if line and line[1] == "SGD")
    assert cells[4:] == ("> 4×", "> 1.6×")


def test_the_record_of_2017_stands_in_for_adam_on_the_articles_problem(tmp_path):
    run = make(tmp_path, Settings(optimizers=("adam", "kfac")), adam=[97, 60, 40], kfac=[97, 40, 9.9, 8.4])
    table = rows([run])
    ten, best = at(table, 10), at(table, ADAM_BEST_2017)
    assert ten["Adam"].cost.is_recorded
    assert ten["Adam"].cost.steps == next(p.step for p in recorded("sigmoid")["adam"].points if p.test_loss <= 10)
    assert ten["Adam"].cost.seconds == 2.0 * ten["Adam"].cost.steps
    assert (best["Adam"].cost.steps, best["Adam"].cost.seconds) == (4917, 9834.0)
    assert best["natgrad.KFAC"].steps_ratio == pytest.approx(4917 / 3)
    assert best["natgrad.KFAC"].seconds_ratio == pytest.approx(9834 / 15)
    # Measured in the run where it was.
    assert not at(table, 50)["natgrad.KFAC"].adam.is_recorded
    text = sheets([run])[0].markdown()
    assert "| 8.485 | Adam | 4,917* | ≈ 9,830* | 1×* | 1×* |" in text
    assert "|  | natgrad.KFAC | 3 | 15 | 1,639×* | 656×* |" in text
    assert "recorded in 2017" in text


def test_what_adam_never_reached_in_2017_gives_a_lower_bound(tmp_path):
    run = make(tmp_path, Settings(optimizers=("adam", "kfac")), adam=[97, 60], kfac=[97, 3.0])
    rows_at = at(rows([run]), BEST_2017)
    assert rows_at["Adam"].cost.is_bound
    assert rows_at["Adam"].cost.steps == 99_999
    text = sheets([run])[0].markdown()
    assert "| 3.065 | Adam | > 99,999* | > 200,000* | – | – |" in text
    assert "> 99,999×*" in text


def test_without_adam_only_the_recorded_steps_compare(tmp_path):
    run = make(tmp_path, Settings(optimizers=("kfac",)), kfac=[97, 40, 8])
    row = at(rows([run]), ADAM_BEST_2017)["natgrad.KFAC"]
    assert (row.steps_ratio, row.seconds_ratio) == (4917 / 2, None)


def test_without_adam_and_record_there_are_no_ratios(tiny, tmp_path):
    run = make(tmp_path, tiny(optimizers=("sgd",)), sgd=[97, 40])
    assert at(rows([run]), 50)["SGD"].steps_ratio is None


def test_a_threshold_above_the_start_is_no_achievement(tmp_path):
    run = make(tmp_path, Settings(optimizers=("adam",), nonlinearity="relu"), adam=[43.6, 29])
    assert {row.threshold for row in rows([run])} == {30}


def test_another_runs_adam_on_the_same_problem_is_the_baseline(tiny, tmp_path):
    with_adam = make(tmp_path / "a", tiny(optimizers=("adam",)), adam=[90, 60, 40])
    other_problem = make(tmp_path / "b", tiny(optimizers=("adam",), images=40), adam=[90, 40])
    without = make(tmp_path / "c", tiny(optimizers=("sgd",)), sgd=[90, 40])
    assert at(rows([other_problem, without, with_adam]), 50)["SGD"].steps_ratio == 2.0


def test_unmeasured_test_losses_are_skipped(tiny, tmp_path):
    run = make(tmp_path, tiny(optimizers=("adam",)), adam=[90, None, 40, None])
    assert [p.step for p in run.curves["adam"].points] == [0, 2]
    assert run.curves["adam"].last_step == 3


def test_the_summary_counts_steps_and_their_cost(tiny, tmp_path):
    run = make(tmp_path, tiny(optimizers=("adam", "sgd")), adam=[90, 60, 40, 41], sgd=[90, 50])
    adam, sgd = sheets([run])[1].lines
    assert adam == ("Adam", "40.000", "2", "4", "2", "1.00")
    assert sgd == ("SGD", "50.000", "1", "2", "5", "2.50")


def test_a_run_that_reached_nothing_has_a_summary_only(tiny, tmp_path):
    run = make(tmp_path, tiny(optimizers=("adam",)), adam=[90, 89])
    assert [sheet.title for sheet in sheets([run])] == ["Summary"]


def test_the_step_time_is_a_median(tiny):
    records = [Record("adam", k, 1.0, 1.0, s) for k, s in enumerate([0.0, 1.0, 2.0, 50.0])]
    assert curve("adam", records).step_seconds == 1.0


def test_recorded_curves_are_the_articles():
    best = {name: c.best for name, c in recorded("sigmoid").items()}
    assert (best["adam"].step, best["adam"].test_loss) == (4917, ADAM_BEST_2017)
    assert (best["kfac-adam"].step, best["kfac-adam"].test_loss) == (1054, BEST_2017)
    assert (best["kfac-sgd"].step, best["sgd"].step) == (47, 59_760)
    assert recorded("relu")["adam"].best.step == 1967
    for curves in (recorded("sigmoid"), recorded("relu")):
        for c in curves.values():
            steps = [p.step for p in c.points]
            assert steps == sorted(set(steps))
