import subprocess
import sys

import pytest
from typer.testing import CliRunner

import natgrad
from natgrad import cli
from natgrad.experiments import demo, require_extra
from natgrad.experiments.runfolder import read_records, read_settings
from natgrad.experiments.settings import Settings

TINY = ["--width-divisor", "32", "--images", "48", "--steps", "3"]


def natgrad_command(*arguments: str):
    """Run the command line in this process; returns (exit code, everything printed)."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_version():
    assert natgrad_command("--version") == (0, f"natgrad {natgrad.__version__}\n")


def test_help_names_the_commands():
    code, output = natgrad_command("--help")
    assert code == 0
    for command in ("autoencoder", "compare", "report", "demo"):
        assert command in output


def test_options_become_settings(tmp_path):
    out = tmp_path / "run"
    options = ["--optimizers", "adam, sgd", "--batch-size", "16", "--seed", "3", "--eval-every", "2", "--weight-norm"]
    code, _ = natgrad_command("autoencoder", *TINY, *options, "--nonlinearity", "relu", "--threads", "1", "--out", out)
    assert code == 0
    assert read_settings(out) == Settings(
        optimizers=("adam", "sgd"),
        nonlinearity="relu",
        weight_norm=True,
        batch_size=16,
        width_divisor=32,
        images=48,
        steps=3,
        seed=3,
        threads=1,
        eval_every=2,
    )


def test_an_unknown_optimizer_names_the_choices(tmp_path):
    code, output = natgrad_command("autoencoder", *TINY, "--optimizers", "adamw", "--out", tmp_path / "run")
    assert code == 2
    assert "unknown optimizer 'adamw': choose from sgd, adam, kfac-sgd, kfac-adam, kfac" in output


def test_resume_and_its_refusals(tmp_path):
    out = tmp_path / "run"
    assert natgrad_command("autoencoder", *TINY, "--optimizers", "sgd", "--out", out)[0] == 0
    code, output = natgrad_command("autoencoder", "--resume", out, "--optimizers", "adam")
    assert code == 2
    assert "optimizers was ('sgd',), not ('adam',)" in output
    code, output = natgrad_command("autoencoder", "--resume", out, "--weight-norm")
    assert code == 2
    assert "weight_norm was False, not True" in output
    code, output = natgrad_command("autoencoder", "--resume", out, "--out", tmp_path / "other")
    assert code == 2
    assert "leave out --out" in output
    assert natgrad_command("autoencoder", "--resume", out, "--steps", "5")[0] == 0
    assert len(read_records(out)) == 5


def test_an_existing_run_is_refused(tmp_path):
    arguments = ["autoencoder", *TINY, "--optimizers", "sgd", "--out", tmp_path / "run"]
    assert natgrad_command(*arguments)[0] == 0
    code, output = natgrad_command(*arguments)
    assert code == 2
    assert "already holds a run" in output
    assert natgrad_command(*arguments, "--overwrite")[0] == 0


def test_compare(tmp_path):
    natgrad_command("autoencoder", *TINY, "--optimizers", "sgd", "--out", tmp_path / "run")
    code, output = natgrad_command("compare", tmp_path / "run", "--out", tmp_path / "elsewhere")
    assert code == 0
    assert (tmp_path / "elsewhere/curves.png").exists()
    assert "Summary" in output
    code, output = natgrad_command("compare", tmp_path / "nothing")
    assert code == 2
    assert "holds no run" in output


def test_report(tmp_path):
    for name, optimizer in (("run", "kfac"), ("other", "sgd")):
        natgrad_command("autoencoder", *TINY, "--optimizers", optimizer, "--out", tmp_path / name)
    assert natgrad_command("report", tmp_path / "run")[0] == 0
    assert (tmp_path / "run/report.html").exists()
    code, output = natgrad_command(
        "report", tmp_path / "run", "--against", tmp_path / "other", "--out", tmp_path / "pages/both.html"
    )
    assert code == 0
    assert f"Written: {tmp_path / 'pages/both.html'}" in output
    assert "other: SGD" in (tmp_path / "pages/both.html").read_text()
    code, output = natgrad_command("report", tmp_path / "nothing")
    assert code == 2
    assert "holds no run" in output


def test_demo_can_be_repeated(tmp_path, monkeypatch):
    for name, value in {"WIDTH_DIVISOR": 32, "IMAGES": 48, "SECONDS": 0.05}.items():
        monkeypatch.setattr(demo, name, value)
    for _ in range(2):
        code, output = natgrad_command("demo", "--out", tmp_path / "demo")
        assert code == 0
    assert "natgrad.KFAC" in output
    assert {r.optimizer for r in read_records(tmp_path / "demo")} == {"adam", "kfac"}


def test_bugs_are_not_disguised(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise ValueError("a bug in the core")

    monkeypatch.setattr(cli.experiment, "start", broken)
    with pytest.raises(ValueError, match="a bug in the core"):
        natgrad_command("autoencoder", *TINY, "--out", tmp_path / "run")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(natgrad.experiments, "find_spec", lambda name: None if name in ("typer", "pooch") else True)
    with pytest.raises(
        ModuleNotFoundError, match=r"need pooch, typer. Install .* pip install 'natgrad\[experiments\]'"
    ):
        require_extra()


def test_without_the_extra_the_command_ends_in_one_line():
    program = "import sys; sys.modules['rich'] = None; from natgrad.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == (
        "natgrad: natgrad's experiments and command line need rich. Install them with: "
        "pip install 'natgrad[experiments]'\n"
    )


def test_python_m_natgrad():
    result = subprocess.run([sys.executable, "-m", "natgrad", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"natgrad {natgrad.__version__}\n"
