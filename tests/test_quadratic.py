"""The choice of a step by a quadratic model: its minimizer in closed form, and what is made of what it achieves."""

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from natgrad.local_model import Change
from natgrad.quadratic import choose, combine, minimize
from quadratic_cases import Direction

pytestmark = pytest.mark.usefixtures("float64")
some_examples = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


class Slope:
    """A loss near a point, told rather than computed."""

    def __init__(self, M: Tensor, changes: list[float], rounding: float = 0.0) -> None:
        self.M, self.changes, self.rounding, self.steps = M, changes, rounding, []

    def curvature(self, directions: list[Direction]) -> Tensor:
        return self.M

    def change(self, step: Direction) -> Change:
        self.steps.append(step["w"].item())
        return Change(self.changes[min(len(self.steps), len(self.changes)) - 1], 0.0, self.rounding)


def chosen(
    local: Any, directions: list[Direction], b: Tensor, given: list[float | None], judge: Any = lambda _: 1.0
) -> tuple[Tensor, dict[str, float]]:
    """Coefficients and diagnostics, where all of the loss was declared."""
    c, _, told = choose(local, directions, b, given, lambda *_: None, judge)
    return c, told


DIRECTIONS = [{"w": torch.tensor(1.0)}, {"w": torch.tensor(10.0)}]


def test_a_step_that_achieves_too_little_is_halved() -> None:
    slope = Slope(torch.eye(1), [5.0, 1.0, -0.5])
    c, diagnostics = chosen(slope, DIRECTIONS[:1], torch.tensor([-4.0]), [None])
    assert slope.steps == [4.0, 2.0, 1.0]
    assert c.tolist() == [1.0]
    assert diagnostics == {"predicted_change": -3.5, "actual_change": -0.5, "kl": 0.5, "halvings": 2.0}


def test_a_fall_that_may_be_rounding_is_none() -> None:
    """Of a saturated softmax two sums of 10¹⁶ nearly cancelled, and steps of any length were taken."""
    slope = Slope(torch.eye(1), [-5.0, -3.0], rounding=4.0)
    c, diagnostics = chosen(slope, DIRECTIONS[:1], torch.tensor([-4.0]), [None])
    assert c.tolist() == [4.0]
    slope = Slope(torch.eye(1), [-5.0, -3.0], rounding=4.5)
    c, diagnostics = chosen(slope, DIRECTIONS[:1], torch.tensor([-4.0]), [None])
    assert c.tolist() == [0.0]
    assert diagnostics["halvings"] == 8.0


def test_nothing_is_halved_where_no_step_is_chosen() -> None:
    slope = Slope(torch.zeros(1, 1), [0.0], rounding=1.0)
    _, diagnostics = chosen(slope, DIRECTIONS[:1], torch.tensor([-4.0]), [None])
    assert diagnostics["halvings"] == 0.0


def test_what_is_shown_by_a_step_before_holds_for_the_first_one_after_it() -> None:
    """Catches a step that was undone and is taken once more, at its full length."""
    asked = []
    c, _ = chosen(
        Slope(torch.eye(1), [-9.0]),
        DIRECTIONS[:1],
        torch.tensor([-4.0]),
        [None],
        judge=lambda x: asked.append(x) or 0.25,
    )
    assert c.tolist() == [1.0]
    assert asked == [0.0]


def test_no_step_is_taken_where_none_lowers_the_loss() -> None:
    c, diagnostics = chosen(Slope(torch.eye(1), [5.0]), DIRECTIONS[:1], torch.tensor([-4.0]), [None])
    assert c.tolist() == [0.0]
    assert diagnostics["halvings"] == 8.0


def test_the_natural_gradient_is_not_followed_uphill() -> None:
    """M = I and b = (1, −1): the minimum has the coefficients (−1, 1)."""
    c, _ = chosen(Slope(torch.eye(2), [-1.0]), DIRECTIONS, torch.tensor([1.0, -1.0]), [None, None])
    assert c.tolist() == [0.0, 1.0]


def test_a_given_momentum_stays_where_the_natural_gradient_is_left_out() -> None:
    c, _ = chosen(Slope(torch.eye(2), [-1.0]), DIRECTIONS, torch.tensor([1.0, -1.0]), [None, 0.5])
    assert c.tolist() == [0.0, 0.5]


def test_a_rate_that_the_user_gave_may_be_uphill() -> None:
    """It is kept, and not excluded as noise, as long as the loss falls."""
    c, _ = chosen(Slope(torch.eye(1), [-1.0]), DIRECTIONS[:1], torch.tensor([1.0]), [0.5])
    assert c.tolist() == [0.5]


def test_a_step_that_the_model_expects_to_raise_the_loss_must_lower_it_all_the_same() -> None:
    """A rate of 3 is beyond the end of the valley, at 2: predicted 1.5, of which a tenth is still a rise."""
    slope = Slope(torch.eye(1), [0.1, -0.5])
    c, diagnostics = chosen(slope, DIRECTIONS[:1], torch.tensor([-1.0]), [3.0])
    assert slope.steps == [3.0, 1.5]
    assert c.tolist() == [1.5]
    assert diagnostics["halvings"] == 1.0


@pytest.mark.parametrize("change", [torch.nan, torch.inf])
def test_a_change_that_is_not_finite_is_no_fall(change: float) -> None:
    slope = Slope(torch.eye(1), [change, -3.0])
    c, _ = chosen(slope, DIRECTIONS[:1], torch.tensor([-4.0]), [None])
    assert c.tolist() == [2.0]


def test_the_previous_step_is_seen_on_the_new_batch() -> None:
    """To second order, from its end back to its start, wherever the next step goes."""
    _, diagnostics = chosen(
        Slope(torch.diag(torch.tensor([1.0, 4.0])), [-9.0]), DIRECTIONS, torch.tensor([-4.0, 0.5]), [None, 0]
    )
    assert diagnostics["previous_change"] == 0.5 - 4 / 2


def test_steps_combine_all_directions() -> None:
    """And leave them as they are."""
    assert combine(DIRECTIONS, torch.tensor([2.0, 0.5]))["w"].item() == 7.0
    assert [direction["w"].item() for direction in DIRECTIONS] == [1.0, 10.0]


def test_a_shorter_direction_moves_its_own_parameters_alone() -> None:
    wide = {"w": torch.tensor(1.0), "u": torch.tensor(3.0)}
    assert combine([wide, {"w": torch.tensor(10.0)}], torch.tensor([2.0, 0.5])) == {"w": 7.0, "u": 6.0}


def definite(k: int, seed: int, rank: int | None = None) -> Tensor:
    rows = torch.randn(rank or k + 2, k, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows


@some_examples
@hypothesis.given(k=st.integers(1, 3), seed=st.integers(0, 1000), data=st.data())
def test_minimize_is_the_closed_form_over_the_free_entries(k: int, seed: int, data: st.DataObject) -> None:
    """Catches the fixed entries' pull on the free ones left out."""
    M, b = definite(k, seed), torch.randn(k, generator=torch.Generator().manual_seed(seed + 1))
    fixed = [data.draw(st.sampled_from([None, 0.0, 0.7, -2.0])) for _ in range(k)]
    c = minimize(M, b, fixed)
    free = torch.tensor([value is None for value in fixed])
    assert torch.equal(c[~free], torch.tensor([value for value in fixed if value is not None], dtype=c.dtype))
    assert torch.allclose((b + M @ c)[free], torch.zeros(int(free.sum())), atol=1e-8)


def test_a_tiny_previous_step_is_not_taken_for_a_null_direction() -> None:
    """Near the end, the natural gradient may be 10⁶ times as long as the last step."""
    M, b, size = definite(2, 0), torch.tensor([-1.0, 0.5]), torch.tensor([1.0, 1e-8])
    scaled = minimize(torch.outer(size, size) * M, size * b, [None, None])
    assert torch.allclose(scaled * size, torch.linalg.solve(M, -b), rtol=1e-6)


@pytest.mark.parametrize(
    ("M", "b", "expected"),
    [
        ([[2.0, 0.0], [0.0, 0.0]], [-1.0, 0.0], [0.5, 0.0]),
        ([[2.0, 0.0], [0.0, -1e-20]], [-1.0, -1.0], [0.5, 0.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [-1.0, -1.0], [0.0, 0.0]),
        ([[1.0, 1.0], [1.0, 1.0]], [-1.0, -1.0], [0.5, 0.5]),  # twice the same direction shares the step
    ],
)
def test_null_directions_are_not_moved_along(M: list[list[float]], b: list[float], expected: list[float]) -> None:
    c = minimize(torch.tensor(M), torch.tensor(b), [None, None])
    assert torch.allclose(c, torch.tensor(expected))
