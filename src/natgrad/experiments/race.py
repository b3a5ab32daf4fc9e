"""Who takes the next step.

The contestants share the machine, and it is never equally fast twice. So they take turns, step by step: whatever slows
one down slows down all of them alike, and ratios of their times stay meaningful.
"""

from collections.abc import Iterator, Sequence

from natgrad.experiments.contestants import Contestant, Record
from natgrad.experiments.settings import Settings


def race(contestants: Sequence[Contestant], settings: Settings) -> Iterator[Record]:
    """Let the contestants take turns until each has reached a limit or diverged; yields a record after every step."""
    while active := [c for c in contestants if not is_finished(c, settings)]:
        yield next_up(active, settings).advance()


def next_up(active: Sequence[Contestant], settings: Settings) -> Contestant:
    """The contestant furthest behind: in training time when time is the limit, in steps (round-robin) otherwise."""
    if settings.seconds is not None:
        return min(active, key=lambda c: c.seconds)
    return min(active, key=lambda c: c.step)


def is_finished(contestant: Contestant, settings: Settings) -> bool:
    """Whether a contestant has diverged, or reached a limit (the step that crosses the time limit is its last)."""
    return (
        contestant.diverged
        or (settings.steps is not None and contestant.step >= settings.steps)
        or (settings.seconds is not None and contestant.seconds >= settings.seconds)
    )
