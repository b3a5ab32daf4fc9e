"""When curvature is gathered and inverses are refreshed: often at first, while it moves fast, then ever more rarely.

Training is divided into intervals. At the first step of each the factors are updated, and all inverses refreshed. An
automatic interval grows with the steps that went before it: curvature that took a hundred steps to become what it is
will not be another after ten more. Once it has its full length the inverses are refreshed one after the other, so that
no step is much slower than the others; earlier, inverses of different ages went together badly (`docs/decisions.md`).
Within intervals more is gathered for factors of which batches have too few rows, as eight of them every sixteen steps
tell next to nothing about hundreds of dimensions; but no pass is made for vectors alone, as normalizations have, of
whose rows each datum gives one.
"""

from collections.abc import Mapping, Set
from typing import Literal

Period = int | Literal["auto"]
# An automatic interval is this share of the steps before it, and at most so many steps.
SHARE, LONGEST = 1 / 8, 16
# Between the intervals, factors for which batches have too few rows get some every so many steps, but no more often.
OFTEN = 2


def interval(step: int, period: Period) -> tuple[int, int]:
    """First step and number of steps of the interval that a step, counted from zero, is in."""
    if period != "auto":
        return step - step % period, period
    first, length = 0, 1
    while first + length <= step and length < LONGEST:
        first += length
        length = min(LONGEST, 1 + int(first * SHARE))
    return first + (step - first) // length * length, length


def starts(step: int, period: Period) -> bool:
    """Whether an interval starts at a step."""
    return interval(step, period)[0] == step


def due(step: int, period: Period, shares: Mapping[str, float], vectors: Set[str] = frozenset()) -> set[str]:
    """Whose factors are updated at a step: all where an interval starts, and on the way those that have too few rows.

    In the end as many rows come together in an interval as where one batch has enough.

    Args:
        step: Counted from zero.
        period: Length of the intervals.
        shares: By name, which part of the rows that determine a factor a batch has.
        vectors: Who are not worth a pass of their own on the way, if there are others.
    """
    if starts(step, period):
        return set(shares)
    if period != "auto":
        return set()
    some = {name for name, share in shares.items() if share < 1 and step % max(OFTEN, int(share * LONGEST)) == 0}
    return set() if some <= vectors < shares.keys() else some


def turn(step: int, period: Period, costs: Mapping[str, float]) -> set[str]:
    """Whose inverse is refreshed at a step, by the cost of each."""
    first, length = interval(step, period)
    if period != "auto" or length < LONGEST:
        return set(costs) if step == first else set()
    chosen, done, total = set(), 0.0, sum(costs.values())
    for name, cost in costs.items():
        middle = (done + cost / 2) / total * length if total else 0.0
        if min(int(middle), length - 1) == step - first:
            chosen.add(name)
        done += cost
    return chosen
