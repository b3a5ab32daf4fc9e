import json
import signal
from pathlib import PurePath

import pytest

from natgrad import checkpoint
from natgrad.experiments import experiment
from natgrad.experiments.contestants import Contestant
from natgrad.experiments.experiment import resume, start
from natgrad.experiments.runfolder import read_records, read_settings
from natgrad.experiments.settings import SettingsError

PNG = b"\x89PNG"


def losses(folder):
    """Everything about the records but the times, keyed by contestant and step; no key may come twice."""
    records = read_records(folder)
    keys = [(r.optimizer, r.step) for r in records]
    assert len(keys) == len(set(keys))
    return {key: (r.train_loss, r.test_loss, r.diagnostics) for key, r in zip(keys, records, strict=True)}


@pytest.fixture
def at_step(monkeypatch):
    """``at_step(name, step, act)`` calls ``act`` in the middle of a contestant's step, after its parameters changed."""

    def plant(name, step, act):
        train = Contestant._train

        def sabotaged(self, batch):
            loss = train(self, batch)
            if (self.name, self.step) == (name, step):
                monkeypatch.setattr(Contestant, "_train", train)
                act()
            return loss

        monkeypatch.setattr(Contestant, "_train", sabotaged)

    return plant


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_a_run_leaves_everything_that_was_measured(tiny, tmp_path, console):
    assert start(tiny(), tmp_path / "run", console) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    files = {"config.json", "environment.json", "metrics.jsonl", "checkpoint.pt", "curves.png", "table.md"}
    assert names == {*files, "digits"}
    assert read_settings(tmp_path / "run") == tiny()
    assert set(losses(tmp_path / "run")) == {(name, k) for name in ("sgd", "adam") for k in range(6)}
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert {"command", "natgrad", "torch", "threads", "processor", "python", "platform"} <= set(environment)
    assert (tmp_path / "run/curves.png").read_bytes().startswith(PNG)
    assert "best test loss" in console.file.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizers": ("sgd", "adam", "kfac-sgd", "kfac-adam", "kfac")},
        # Interrupted in the middle of the first epoch of three batches, and on into the second.
        {"optimizers": ("adam", "kfac"), "batch_size": 16},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path, console, changes):
    start(tiny(**changes, steps=5), tmp_path / "whole", console)
    start(tiny(**changes, steps=2), tmp_path / "parts", console)
    assert resume(tmp_path / "parts", {"steps": 5}, console) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    seconds = [r.seconds for r in read_records(tmp_path / "parts") if r.optimizer == "kfac"]
    assert seconds == sorted(seconds)


def test_ctrl_c_finishes_the_step_saves_and_draws(tiny, tmp_path, console, at_step):
    start(tiny(), tmp_path / "whole", console)
    before = signal.getsignal(signal.SIGINT)
    at_step("adam", 2, interrupt)
    assert start(tiny(), tmp_path / "run", console) == 130
    assert signal.getsignal(signal.SIGINT) is before
    measured = losses(tmp_path / "run")
    assert set(measured) == {(name, k) for name in ("sgd", "adam") for k in range(3)}
    assert (tmp_path / "run/curves.png").read_bytes().startswith(PNG)
    assert "| SGD |" in (tmp_path / "run/table.md").read_text()
    assert f"natgrad autoencoder --resume {tmp_path / 'run'}" in console.file.getvalue()
    assert resume(tmp_path / "run", {}, console) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_second_ctrl_c_does_not_save_half_a_step(tiny, tmp_path, console, at_step):
    start(tiny(steps=3), tmp_path / "run", console)
    saved = (tmp_path / "run/checkpoint.pt").read_bytes()
    at_step("adam", 4, lambda: (interrupt(), interrupt()))
    (tmp_path / "run/curves.png").unlink()
    assert resume(tmp_path / "run", {"steps": 6}, console) == 130
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == saved
    assert set(losses(tmp_path / "run")) == {("sgd", k) for k in range(5)} | {("adam", k) for k in range(4)}
    assert (tmp_path / "run/curves.png").read_bytes().startswith(PNG)
    # The records of steps 3 and 4 are beyond the checkpoint: they are measured again, not twice.
    start(tiny(), tmp_path / "whole", console)
    assert resume(tmp_path / "run", {}, console) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_interrupted_before_the_first_record(tiny, tmp_path, console, at_step):
    at_step("sgd", 0, lambda: (interrupt(), interrupt()))
    assert start(tiny(), tmp_path / "run", console) == 130
    assert losses(tmp_path / "run") == {}
    assert (tmp_path / "run/curves.png").exists()
    with pytest.raises(SettingsError, match=r"has no checkpoint\.pt"):
        resume(tmp_path / "run", {}, console)


def test_a_checkpoint_is_saved_every_minute(tiny, tmp_path, console, monkeypatch):
    now = iter(range(0, 10_000, 25))
    monkeypatch.setattr(experiment.time, "monotonic", lambda: float(next(now)))
    saved = []
    monkeypatch.setattr(experiment.RunFolder, "save_checkpoint", lambda self, contestants: saved.append(1))
    start(tiny(), tmp_path / "run", console)
    # 12 steps 25 seconds apart, and the end.
    assert len(saved) > 2


def test_half_a_line_of_a_killed_process_is_dropped(tiny, tmp_path, console):
    start(tiny(steps=3), tmp_path / "run", console)
    whole = losses(tmp_path / "run")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"optimizer": "sgd", "step": 3, "tr')
    assert losses(tmp_path / "run") == whole
    resume(tmp_path / "run", {"steps": 4}, console)
    assert len(losses(tmp_path / "run")) == 8


def test_a_run_is_not_replaced_by_accident(tiny, tmp_path, console):
    start(tiny(), tmp_path / "run", console)
    measured = losses(tmp_path / "run")
    with pytest.raises(SettingsError, match=r"already holds a run.*--resume.*--overwrite"):
        start(tiny(seed=2), tmp_path / "run", console)
    assert losses(tmp_path / "run") == measured
    start(tiny(seed=2, steps=2), tmp_path / "run", console, overwrite=True)
    assert len(losses(tmp_path / "run")) == 4


def test_resuming_refuses_other_settings_but_takes_new_limits(tiny, tmp_path, console):
    start(tiny(steps=2), tmp_path / "run", console)
    with pytest.raises(SettingsError, match=r"images was 48, not 64; seed was 1, not 2.*only steps and seconds"):
        resume(tmp_path / "run", {"images": 64, "seed": 2, "steps": 3}, console)
    assert resume(tmp_path / "run", {"images": 48, "steps": 3}, console) == 0
    assert read_settings(tmp_path / "run") == tiny(steps=3)
    assert len(json.loads((tmp_path / "run/environment.json").read_text())["resumed"]) == 1


def test_a_new_limit_replaces_the_old_ones(tiny, tmp_path, console):
    start(tiny(steps=2), tmp_path / "run", console)
    resume(tmp_path / "run", {"seconds": 0.05}, console)
    assert len(losses(tmp_path / "run")) > 4


def test_a_folder_without_a_run_is_named(tmp_path, console):
    with pytest.raises(SettingsError, match="holds no run"):
        resume(tmp_path / "nothing", {}, console)


def code_in_disguise(path):
    """A checkpoint that would run code if it were trusted: any class will do, unpickling calls it."""
    checkpoint.save({"sgd": PurePath("anything")}, path)


@pytest.mark.parametrize("write", [lambda path: path.write_bytes(b"not a checkpoint"), code_in_disguise])
def test_a_checkpoint_that_is_none_is_refused(tiny, tmp_path, console, write):
    start(tiny(steps=2), tmp_path / "run", console)
    write(tmp_path / "run/checkpoint.pt")
    with pytest.raises(SettingsError, match=r"checkpoint\.pt (is truncated|holds what cannot be read)"):
        resume(tmp_path / "run", {}, console)


def test_an_unknown_optimizer_leaves_no_folder(tiny, tmp_path, console):
    with pytest.raises(SettingsError, match="unknown optimizer"):
        start(tiny(optimizers=("adamw",)), tmp_path / "run", console)
    assert not (tmp_path / "run").exists()
