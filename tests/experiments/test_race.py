from dataclasses import dataclass

from natgrad.experiments.contestants import Record
from natgrad.experiments.race import race


@dataclass
class Fake:
    """A contestant whose steps take a known time."""

    name: str
    duration: float
    diverges_at: int = 10**9
    step: int = 0
    seconds: float = 0.0
    diverged: bool = False

    def advance(self) -> Record:
        record = Record(self.name, self.step, 1.0, 1.0, self.seconds)
        self.step += 1
        self.seconds += self.duration
        self.diverged = self.step >= self.diverges_at
        return record


def test_steps_as_the_limit_means_taking_turns(tiny):
    contestants = [Fake("slow", 5), Fake("fast", 1)]
    order = [r.optimizer for r in race(contestants, tiny(steps=3))]
    assert order == ["slow", "fast"] * 3


def test_seconds_as_the_limit_gives_the_next_step_to_who_used_least(tiny):
    slow, fast = Fake("slow", 5), Fake("fast", 1)
    for _ in race([slow, fast], tiny(steps=None, seconds=20)):
        # At no time is one more than one step ahead, so noise at any time hits both.
        assert abs(slow.seconds - fast.seconds) <= 5
    assert (slow.step, fast.step) == (4, 20)


def test_both_limits_hold(tiny):
    slow, fast = Fake("slow", 5), Fake("fast", 1)
    list(race([slow, fast], tiny(steps=6, seconds=20)))
    assert (slow.step, fast.step) == (4, 6)


def test_the_others_go_on_without_one_that_diverged(tiny):
    bad, good = Fake("bad", 1, diverges_at=2), Fake("good", 1)
    list(race([bad, good], tiny(steps=4)))
    assert (bad.step, good.step) == (2, 4)
