import json

import pytest

from natgrad.experiments.settings import Settings, SettingsError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonlinearity": "tanh"}, "choose one of sigmoid, relu"),
        ({"optimizers": ()}, "name at least one"),
        ({"optimizers": ("adam", "adam")}, "name each once"),
        ({"images": 10_001}, "give 1 to 10000"),
        ({"batch_size": 49}, "give 1 to 48"),
        ({"width_divisor": 197}, "give 1 to 196"),
        ({"steps": 0}, "steps is 0: give a positive number"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"eval_every": 0}, "eval_every is 0"),
    ],
)
def test_impossible_settings_say_what_is_possible(tiny, changes, message):
    with pytest.raises(SettingsError, match=message):
        tiny(**changes)


def test_settings_survive_json(tiny):
    settings = tiny(seconds=2.5)
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_settings_of_another_version_are_refused(tiny):
    with pytest.raises(SettingsError, match="width_factor"):
        Settings.from_json({**tiny().to_json(), "width_factor": 2})


def test_a_limit_is_always_set():
    assert Settings().steps == 100
    assert Settings(seconds=1.0).steps is None


@pytest.mark.parametrize(
    ("changes", "is_full_size"),
    [
        ({}, True),
        ({"nonlinearity": "relu"}, True),
        ({"batch_size": 10_000}, True),
        ({"batch_size": 6_000}, False),
        ({"width_divisor": 2}, False),
        ({"images": 9_999}, False),
        ({"weight_norm": True}, False),
    ],
)
def test_only_the_articles_own_problem_is_compared_with_2017(changes, is_full_size):
    assert Settings(**changes).is_full_size is is_full_size


def test_the_test_loss_is_measured_every_step_or_four_times_an_epoch():
    assert Settings().evaluation_interval == 1
    assert Settings(batch_size=128).evaluation_interval == 10_000 // 128 // 4
    assert Settings(batch_size=128, eval_every=7).evaluation_interval == 7


def test_differences_leave_the_limits_out(tiny):
    assert tiny().differences({"steps": 99, "seconds": 1.0, "seed": 2, "images": 48}) == {"seed": (1, 2)}
