"""Averages of gradients, and the rate along them, against closed forms."""

import math

import pytest
import torch
from torch import Tensor, nn

from natgrad import averaging
from natgrad.averaging import (
    ANEW,
    DECAY,
    EVERY,
    GAIN,
    LONGER,
    PERSISTENT,
    RISE,
    RISING,
    SHORTEST_WINDOW,
    SHRINK,
    STEEP,
    WINDOW,
    Averages,
    Pace,
    Progress,
    noise_left,
)

pytestmark = pytest.mark.usefixtures("float64")


def averages_of(dtype: torch.dtype = torch.float64) -> tuple[Averages, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros(2, dtype=dtype))
    return Averages({parameter: {}}, [parameter]), parameter


def test_the_average_looks_ahead_at_the_latest_gradient() -> None:
    """Σ β^age (1 − β) g, β times that and (1 − β) g once more: catches an average of what it looked ahead to."""
    averages, parameter = averages_of()
    gradients = torch.randn(5, 2)
    for g in gradients:
        ahead = averages.take({parameter: g}.get)
    weights = (1 - DECAY) * DECAY ** torch.arange(4, -1, -1)
    average = weights @ gradients
    torch.testing.assert_close(averages.state[parameter]["average"], average)
    torch.testing.assert_close(ahead[parameter], DECAY * average + (1 - DECAY) * gradients[-1])


def test_a_parameter_without_a_gradient_keeps_its_average() -> None:
    averages, parameter = averages_of()
    averages.take({parameter: torch.ones(2)}.get)
    assert averages.take({}.get) == {}
    torch.testing.assert_close(averages.state[parameter]["average"], torch.full((2,), 1 - DECAY))


def test_averages_of_half_precision_are_single() -> None:
    averages, parameter = averages_of(torch.bfloat16)
    ahead = averages.take({parameter: torch.ones(2, dtype=torch.bfloat16)}.get)
    assert {ahead[parameter].dtype, averages.state[parameter]["average"].dtype} == {torch.float32}


def test_what_is_not_averaged_any_more_is_forgotten() -> None:
    """And is there as a zero from the first step on."""
    averages, parameter = averages_of()
    averages.rest()
    assert averages.state[parameter]["average"].tolist() == [0.0, 0.0]
    averages.take({parameter: torch.ones(2)}.get)
    averages.rest()  # there was no step along them yet
    assert averages.state[parameter]["average"].any()
    pace(averages.state[parameter])
    averages.rest()
    assert not averages.state[parameter]["average"].any()
    assert averages.state[parameter].keys() == {"average", "step"}


# The pace.


def pace(state: dict[str, Tensor], slope: float = 2.0, curvature: float = 8.0) -> Pace:
    """Measured at a step that was taken."""
    state["step"] = torch.tensor(100.0)
    one = Pace(state)
    one.measure(slope, curvature)
    one.take(1.0, -1.0, -0.5)
    return one


def test_the_rate_minimizes_the_quadratic_model() -> None:
    """Slope −2 and curvature 8 along −Δ."""
    assert pace({}).rate == 0.25
    assert pace({}).ratio == 4.0


def test_rates_fall_at_once_and_rise_slowly() -> None:
    """By the geometric mean: catches an average that a short step has to wait for. And never by more than RISE."""
    steeper, flatter, flat = pace({}), pace({}), pace({})
    steeper.measure(2.0, 32.0)
    flatter.measure(2.0, 4.0)
    flat.measure(2.0, 1e-6)
    assert steeper.rate == 1 / 16
    assert flatter.rate == pytest.approx(0.25 * 2**0.5)
    assert flat.rate == 0.25 * RISE


@pytest.mark.parametrize(("error", "rises"), [(0.9, 1), (1.1, 0)])
def test_rates_rise_once_a_window_and_where_the_error_fell(error: float, rises: int) -> None:
    """Data learnt by heart show no curvature at any measurement; what was lost within the window comes back."""
    state: dict[str, Tensor] = {}
    one = pace(state)
    for window in ([1.0] * SHORTEST_WINDOW, [error] * SHORTEST_WINDOW):
        for number, latest in enumerate(window):
            state["step"] = torch.tensor(float(number))
            one.note(latest, 0.0, of_residuals=True, noisy=False)
            one.measure(2.0, 1e-6)
    expected = 2 + rises  # in the first window, and after it, as it had nothing to compare with
    assert one.ratio == pytest.approx(4.0 / RISE**expected)
    one.measure(2.0, 80.0)
    assert one.ratio == 40.0
    one.measure(2.0, 1e-6)
    assert one.ratio == pytest.approx(max(4.0 / RISE**expected, math.sqrt(40.0 * 0.5e-6)))


@pytest.mark.parametrize("error", [0.9, 1.1])
def test_a_rate_that_fell_by_much_comes_back_without_climbing_window_by_window(error: float) -> None:
    """A direction may be steep for once: a fall to a twentieth would take until 2.6 times as many steps."""
    window = Progress(before=1.0, least=1.0)
    for _ in range(SHORTEST_WINDOW):
        window = window.note(error, 0.1, -1.0)
    assert window.next(pace=40.0, of_residuals=True, noisy=False).least == RISE
    assert window._replace(least=0.0).next(pace=40.0, of_residuals=True, noisy=False).least == (
        40.0 / RISE if error < 1 else 40.0
    )


def test_the_noise_left_is_that_of_independent_gradients() -> None:
    """Σ of the squared weights of unit impulses, one after the other, by the share of noise in one of them."""
    weights = []
    for age in range(200):
        averages, parameter = averages_of()
        for step in range(age + 1):
            ahead = averages.take({parameter: torch.full((2,), float(step == 0))}.get)
        weights.append(float(ahead[parameter][0]))
    left = sum(weight**2 for weight in weights)
    assert noise_left(0.6) == pytest.approx(left * 0.6 / (left * 0.6 + 0.4), rel=1e-8)
    assert noise_left(0.0) == 0.0
    assert noise_left(1.0) == pytest.approx(1.0)


def test_a_direction_without_curvature_has_a_rate() -> None:
    assert pace({}, 2.0, 0.0).rate == pytest.approx(1 / averaging.TINY)


def test_it_is_measured_when_it_is_old_when_the_metric_is_new_and_when_steps_are_longer() -> None:
    assert Pace({}).due(1.0, renewed=False)
    one = pace({}, slope=2.0)
    for _ in range(EVERY - 1):
        assert not one.due(0.99 * LONGER**2 * 2.0, renewed=False)
        assert one.due(1.01 * LONGER**2 * 2.0, renewed=False)
        assert one.due(2.0, renewed=True)
        one.take(1.0, -1.0, -0.5)
    assert one.due(2.0, renewed=False)


def test_a_rate_lags_where_the_slope_has_become_no_smaller() -> None:
    one = pace({})
    assert one.lags(-1.01)  # it was −1 before the step
    assert not one.lags(-0.99)


def test_a_rate_that_may_not_rise_does_not_lag() -> None:
    """Catches measuring at every step of a window what the bound of that window leaves as it is."""
    one = pace({})
    for _ in range(40):
        one.measure(1.0, 0.01)
        one.take(1.0, -1.0, -0.5)
    assert one.ratio == one._progress.least
    assert not one.lags(-2.0)


def test_after_a_step_that_was_not_taken_the_rate_is_another_averages() -> None:
    """Catches a rate that failed, and is taken untried along the next average; and one that the old rate holds back."""
    one = pace({})
    one.rest()
    assert one.due(1e-9, renewed=False)
    one.measure(2.0, 0.2)
    assert one.rate == pytest.approx(10.0)


def test_an_average_that_starts_anew_is_not_followed_to_infinity() -> None:
    """A batch that is learnt, or surely wrong, shows no curvature: a rate of 1e-4 became 4e4, and the loss 4e19."""
    state: dict[str, Tensor] = {}
    one = pace(state)
    one.rest()
    for number in range(4 * SHORTEST_WINDOW):  # windows end, and nothing is measured
        state["step"] = torch.tensor(100.0 + number)
        one.note(1.0, 0.0, of_residuals=True, noisy=False)
    one.measure(2.0, 0.0)
    assert one.rate <= one.factor * RISE * ANEW / 4 * (1 + 1e-6)


def test_a_step_that_had_to_be_halved_halves_the_rate() -> None:
    one = pace({})
    one.take(0.5, -1.0, -0.5)
    assert one.rate == 0.125
    assert one.promised == -0.5


# Progress.


def progress(
    errors: list[float], slope: float = 0.0, step: float = 0.0, factor: float = 1.0, noisy: bool = False
) -> float:
    """What steps are multiplied by after so many batches; each step is to have had the slope −1 at its start."""
    state: dict[str, Tensor] = {}
    one = pace(state)
    state["progress"] = torch.tensor(Progress(factor=factor))
    for number, error in enumerate(errors):
        state["step"] = torch.tensor(step + number)
        one.note(error, slope, of_residuals=True, noisy=noisy)
    return one.factor


@pytest.mark.parametrize(("fall", "expected"), [(1.1 * GAIN, 1.0), (0.9 * GAIN, SHRINK), (-0.1, SHRINK)])
def test_steps_become_shorter_once_the_error_stops_falling(fall: float, expected: float) -> None:
    first, second = [1.0, 3.0] * (SHORTEST_WINDOW // 2), [2 * (1 - fall)] * SHORTEST_WINDOW
    assert progress(first) == 1.0  # with nothing to compare
    assert progress(first + second[1:]) == 1.0
    assert progress(first + second) == pytest.approx(expected)


def test_steps_become_shorter_faster_where_batches_are_nothing_but_noise() -> None:
    """And longer again as elsewhere. Catches embeddings whose steps are too long for hundreds of steps."""
    window = [1.0] * SHORTEST_WINDOW
    assert progress(window * 2, noisy=True) == pytest.approx(STEEP)
    assert progress(window, -1.1 * PERSISTENT, factor=0.5, noisy=True) == pytest.approx(0.5 / SHRINK)


def test_windows_grow_with_the_steps() -> None:
    """A quarter of 400 steps, then of 500: catches windows whose noise decides, and rates that fall exponentially."""
    assert progress([1.0] * 224, step=400) == 1.0
    assert progress([1.0] * 225, step=400) == pytest.approx(SHRINK)
    assert progress([1.0] * 1000) > SHRINK ** (2 + math.log(1000 / SHORTEST_WINDOW, 1 + WINDOW))


def test_steps_become_longer_where_slopes_persist() -> None:
    """A slope of −0.5 after the step, of −1 before it; up to what the model means."""
    window = [1.0] * SHORTEST_WINDOW
    assert progress(window, -1.1 * PERSISTENT, factor=0.5) == pytest.approx(0.5 / SHRINK)
    assert progress(window, -0.9 * PERSISTENT, factor=0.5) == pytest.approx(0.5)
    assert progress(window, -1.0) == 1.0
    assert progress(window * 2, 1.0) == pytest.approx(SHRINK)  # the loss rises where a step ends


@pytest.mark.parametrize(("slope", "expected"), [(-0.02, 1.0), (0.02, SHRINK)])
def test_an_error_that_tells_nothing_is_no_reason_for_shorter_steps(slope: float, expected: float) -> None:
    """That of absolute errors is a constant. Catches steps of a hundredth where the loss falls as before."""
    assert progress([1.0] * 4 * SHORTEST_WINDOW, slope) == pytest.approx(expected**3)


@pytest.mark.parametrize("rising", [False, True])
def test_an_error_of_no_residuals_is_no_reason_either(rising: bool) -> None:
    """It grows as variances are learnt: catches steps of a hundredth while noise hides that the loss falls."""
    window = Progress(before=1.0)
    for number in range(16):
        window = window.note(2.0, 0.1 if rising or number % 3 else -0.1, -1.0)
    assert (window.slopes > RISING * math.sqrt(window.squares)) == rising
    assert window.next(1.0, of_residuals=False, noisy=False).factor == (SHRINK if rising else 1.0)
    assert window.next(1.0, of_residuals=True, noisy=False).factor == SHRINK


def test_an_error_of_no_residuals_is_no_progress() -> None:
    """It may fall while the loss rises; where no step was taken it tells nothing either."""
    window = Progress(before=1.0)
    for _ in range(16):
        window = window.note(0.5, 0.1, -1.0)
    assert window.next(1.0, of_residuals=False, noisy=False).factor == SHRINK
    assert Progress(steps=8.0, errors=16.0, before=1.0).next(1.0, of_residuals=False, noisy=False).factor == 1.0


def test_slopes_that_noise_explains_are_no_evidence() -> None:
    """One large slope downhill among others; the rate may rise no more either, after such a window."""
    window = Progress(before=1.0)
    for number in range(SHORTEST_WINDOW):
        window = window.note(1.0, -1.0 if number == 0 else 0.1, -1.0)
    after = window.next(pace=2.0, of_residuals=True, noisy=False)
    assert (after.factor, after.least) == (SHRINK, 2.0)
    for _ in range(SHORTEST_WINDOW):
        after = after.note(1.0, -0.01, -1.0)
    again = after.next(pace=4.0, of_residuals=True, noisy=False)
    assert (again.factor, again.least) == (SHRINK, 4.0 / RISE)
    assert again[:3] == (0.0, 0.0, 0.0)
    assert again[6:] == (0.0, 0.0, 0.0)


def test_entries_that_are_next_to_nothing_become_nothing() -> None:
    """Those of a unit that died halve every seven steps: catches arithmetic on denormal numbers, ten times as slow."""
    averages, parameter = averages_of(torch.float32)
    gradient = torch.tensor([1.0, 0.0], dtype=torch.float32)
    averages.take({parameter: torch.ones_like(gradient)}.get)
    for step in range(1, 1000):
        averages.state[parameter]["step"] = torch.tensor(float(step))
        averages.take({parameter: gradient}.get)
        second = averages.state[parameter]["average"][1]
        assert second == 0 or second > torch.finfo(torch.float32).tiny
    assert second == 0


def test_a_single_batch_counts_for_no_more_than_the_whole_slope() -> None:
    """Catches a window decided by one batch of which the direction knew nothing."""
    state: dict[str, Tensor] = {}
    one = pace(state)
    state["progress"] = torch.tensor(Progress(factor=0.5))
    for number in range(SHORTEST_WINDOW):
        state["step"] = torch.tensor(float(number))
        one.note(1.0, 0.0 if number else -1e6, of_residuals=True, noisy=False)
    assert one.factor == 0.5


def test_after_a_step_that_was_not_taken_nothing_persists() -> None:
    state: dict[str, Tensor] = {}
    one = pace(state)
    one.rest()
    one.note(1.0, -1.0, of_residuals=True, noisy=False)
    assert state["progress"].tolist()[:3] == [1.0, 1.0, 0.0]
