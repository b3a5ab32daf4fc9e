"""``natgrad bench`` on the command line."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from natgrad import cli
from natgrad.experiments.bench import models, protocol
from natgrad.experiments.bench.records import Folder
from natgrad.experiments.bench.workloads import language

SMALL = ["--workloads", "linear", "--contestants", "adamw, kfac", "--scale", "0.001"]


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "measure", lambda workload, contestant, threads: 1e6 * threads)


def bench(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_tune_run_and_report(tmp_path: Path) -> None:
    assert bench("tune", *SMALL, "--trials", 2, "--out", tmp_path)[0] == 0
    assert bench("run", *SMALL, "--seeds", 1, "--out", tmp_path)[0] == 0
    stages = {(key.contestant, key.stage, key.index) for key in Folder(tmp_path).records}
    runs = {("tune", 0), ("tune", 1), ("defaults", 1), ("tuned", 1)}
    assert stages == {(name, *run) for name in ("adamw", "kfac") for run in runs}
    assert json.loads((tmp_path / "memory.json").read_text()) == {"linear": {"adamw": 1e6, "kfac": 1e6}}
    assert json.loads((tmp_path / "environment.json").read_text())[0]["threads"] == 1
    table = (tmp_path / "table.md").read_text()
    (tmp_path / "table.md").unlink()
    assert bench("report", "--out", tmp_path)[0] == 0
    assert (tmp_path / "table.md").read_text() == table


def test_without_tuning_there_are_defaults_only(tmp_path: Path) -> None:
    assert bench("run", *SMALL, "--seeds", 1, "--out", tmp_path)[0] == 0
    assert {key.stage for key in Folder(tmp_path).records} == {"defaults"}


def test_what_the_user_can_mend_is_one_line(tmp_path: Path) -> None:
    code, output = bench("run", "--workloads", "cifar", "--out", tmp_path)
    assert code == 2
    assert output.startswith("natgrad: unknown workload 'cifar': choose from autoencoder,")
    code, output = bench("overhead", "--axes", "height", "--out", tmp_path)
    assert code == 2
    assert "unknown axis 'height': choose from article, fresh, batch, width, depth, period" in output


def test_an_interruption_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(trials: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(protocol, "race", interrupt)
    code, output = bench("run", *SMALL, "--out", tmp_path)
    assert code == 130
    assert "The same command goes on from here." in output


def test_scaling_asks_for_its_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(models, "collect", lambda path, *arguments: asked.append(arguments[:3]) or [])
    assert bench("scaling", "--steps", 4, "--contestants", "kfac,soap", "--out", tmp_path)[0] == 0
    assert asked == [(("batch", "width", "depth"), ("kfac", "soap"), 4)]


def test_text_from_the_cache_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))
    monkeypatch.setattr(language, "ADDRESS", "http://127.0.0.1:9/text")
    monkeypatch.setattr(language, "SHA256", hashlib.sha256(b"To be").hexdigest())
    (tmp_path / language.FILE).write_bytes(b"To be")
    assert language.shakespeare() == "To be"
    (tmp_path / language.FILE).write_bytes(b"not to be")
    code, output = bench("run", "--workloads", "gpt", "--contestants", "adamw", "--out", tmp_path / "out")
    assert code == 2
    assert "Without it, `natgrad bench` runs every workload but gpt." in output
