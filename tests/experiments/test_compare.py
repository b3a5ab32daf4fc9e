import io
import shutil
from dataclasses import replace

import pytest
from rich.console import Console

from natgrad.experiments import plot
from natgrad.experiments.compare import compare
from natgrad.experiments.curves import read_run
from natgrad.experiments.experiment import start
from natgrad.experiments.settings import Settings, SettingsError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs of different seeds, in folders named one and two."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in ((1, "one"), (2, "two")):
        settings = Settings(optimizers=("sgd", "adam"), width_divisor=32, images=48, steps=8, seed=seed)
        start(settings, folder / name, Console(file=io.StringIO()))
    return folder / "one", folder / "two"


def test_one_run_is_redrawn_in_its_folder(runs, console):
    table = (runs[0] / "table.md").read_text()
    for name in ("table.md", "curves.png"):
        (runs[0] / name).unlink()
    compare([runs[0]], None, console)
    assert (runs[0] / "table.md").read_text() == table
    assert (runs[0] / "curves.png").stat().st_size > 10_000
    assert "Summary" in console.file.getvalue()


def test_several_runs_are_overlaid_and_named(runs, console, tmp_path):
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.iterdir()}
    compare(runs, tmp_path / "both", console)
    table = (tmp_path / "both/table.md").read_text()
    for label in ("one: SGD", "one: Adam", "two: SGD", "two: Adam"):
        assert label in table
    assert (tmp_path / "both/curves.png").exists()
    assert {path: path.stat().st_mtime_ns for run in runs for path in run.iterdir()} == before
    assert "different problems" not in console.file.getvalue()


def test_runs_of_the_same_folder_name_are_told_apart(runs, console, tmp_path):
    shutil.copytree(runs[0], tmp_path / "one")
    compare([runs[0], tmp_path / "one"], tmp_path / "both", console)
    assert f"{tmp_path / 'one'}: Adam" in (tmp_path / "both/table.md").read_text()


def test_different_problems_are_pointed_out(runs, console, tmp_path):
    start(Settings(optimizers=("sgd",), width_divisor=16, images=40, steps=2), tmp_path / "wide", console)
    compare([runs[0], tmp_path / "wide"], tmp_path / "both", console)
    assert "different problems" in console.file.getvalue()
    assert "wide: 1/16 width, sigmoid, 40 images" in console.file.getvalue()


def test_a_folder_without_a_run_is_refused(console, tmp_path):
    with pytest.raises(SettingsError, match="holds no run"):
        compare([tmp_path], None, console)


def test_only_the_articles_problem_shows_the_curves_of_2017(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "_draw_recorded", lambda *args: drawn.append(args[-1]))
    plot.draw([read_run(runs[0])], "small", tmp_path / "small.png")
    assert drawn == []
    run = read_run(runs[0])
    plot.draw([replace(run, settings=Settings(nonlinearity="relu"))], "full", tmp_path / "full.png")
    assert drawn == ["relu"]


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "relu"])
def test_the_curves_of_2017_can_be_drawn(runs, tmp_path, nonlinearity):
    run = read_run(runs[0])
    plot.draw([replace(run, settings=Settings(nonlinearity=nonlinearity))], "full", tmp_path / "full.png")
    assert (tmp_path / "full.png").stat().st_size > 10_000
