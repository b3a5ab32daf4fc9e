"""The examples for training frameworks, as a user would run them; `make test-frameworks` installs what they need."""

import importlib.util
import pathlib
from types import ModuleType

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
pytestmark = [
    pytest.mark.frameworks,
    # Of the frameworks themselves.
    pytest.mark.filterwarnings("ignore"),
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scalars(folder: pathlib.Path) -> dict[str, list[float]]:
    """What TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[float]] = {}
    for file in folder.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(file)).Reload()
        found |= {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return found


def test_lightning(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("lightning")
    assert load("with_lightning").main(str(tmp_path)) > 0.8
    shown = scalars(tmp_path)
    assert len(shown["kfac/step_norm"]) == 48
    assert sum(shown["kfac/skipped_steps"]) == 0


def test_hugging_face_trainer(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("transformers")
    assert load("with_trainer").main(str(tmp_path)) < 1.0  # from log 12 = 2.5
    shown = scalars(tmp_path)
    assert len(shown["kfac/predicted_change"]) == 60
    assert shown["kfac/loss_multiplier"] == [1.0] * 60


def test_accelerate(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("accelerate")
    assert load("with_accelerate").main(str(tmp_path)) < 0.02
    shown = scalars(tmp_path)
    assert len(shown["lr"]) == 40
    assert shown["loss_multiplier"] == [1.0] * 40
