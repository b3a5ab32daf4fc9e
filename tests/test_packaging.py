"""What is published: an sdist and a wheel that work in an environment of their own. Slow: it installs torch."""

import os
import pathlib
import subprocess
import sys
import venv
import zipfile

import pytest

import natgrad

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.slow
FIRST_RUN = """
import torch, natgrad
from torch import nn
model = nn.Linear(3, 2)
optimizer = natgrad.KFAC(model, loss="mse")
torch.nn.functional.mse_loss(model(torch.randn(8, 3)), torch.randn(8, 2)).backward()
optimizer.step()
assert all(p.isfinite().all() for p in model.parameters())
print(natgrad.__file__)
"""


def run(*command, **options) -> str:
    # PYTHONPATH may lead to our sources.
    outside = {name: value for name, value in options.pop("env", os.environ).items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=outside, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT))
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The programs of an environment with the wheel, its experiments, and nothing of this one."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    (wheel,) = built.glob("*.whl")
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    run(*pip, f"{wheel}[experiments]")
    return folder / "bin"


def test_the_wheel_is_small_and_complete(built) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size < 5_000_000
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = ROOT / "src"
    wanted = {
        str(p.relative_to(sources)) for p in sources.rglob("*") if p.suffix in {".py", ".j2", ".css", ".js", ".gz"}
    }
    assert wanted | {"natgrad/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "examples/"))]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_a_first_run(installed, tmp_path) -> None:
    location = run(str(installed / "python"), "-c", FIRST_RUN, cwd=tmp_path)
    assert "site-packages" in location


def test_the_command_line(installed, tmp_path) -> None:
    version = f"natgrad {natgrad.__version__}\n"
    assert run(str(installed / "natgrad"), "--version", cwd=tmp_path) == version
    assert run(str(installed / "python"), "-m", "natgrad", "--version", cwd=tmp_path) == version
    assert "Gflop/s" in run(str(installed / "natgrad"), "doctor", cwd=tmp_path)
    out = tmp_path / "run"
    run(
        str(installed / "natgrad"),
        "autoencoder",
        "--width-divisor",
        "32",
        "--images",
        "48",
        "--steps",
        "3",
        "--out",
        out,
    )
    run(str(installed / "natgrad"), "report", str(out), cwd=tmp_path)
    assert (out / "report.html").exists()


ASKED = {
    "bash": {"COMP_WORDS": "natgrad do", "COMP_CWORD": "1"},
    "zsh": {"_TYPER_COMPLETE_ARGS": "natgrad do"},
    "fish": {"_TYPER_COMPLETE_ARGS": "natgrad do", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}


@pytest.mark.parametrize("shell", ASKED)
def test_completion(installed, tmp_path, shell) -> None:
    """As the shell asks for it: `--show-completion` looks for the shell that it runs in, whatever stands behind it."""
    asked = {**os.environ, "_NATGRAD_COMPLETE": f"complete_{shell}", **ASKED[shell]}
    answer = run(str(installed / "natgrad"), cwd=tmp_path, env=asked)
    assert "doctor" in answer
    assert "verify" not in answer
