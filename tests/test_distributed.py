"""Several ranks take the steps that one process takes on all their data."""

import pytest
import torch
from torch import Tensor

import ranks
from rank_cases import GIVEN, Case, Ranks, Training, relative

STEPS = 20
CLIPPED = {"kl_clip": 1e-2}
HELD = {"inverse": "eigen", "inverse_period": 3}
CASES = {
    "automatic": Case(),
    "automatic, uneven": Case(uneven=True),
    "given": Case(GIVEN),
    "given, uneven": Case(GIVEN, uneven=True),
    "empirical": Case({"fisher": "empirical"}),
    "empirical, given, classes": Case({"fisher": "empirical", **GIVEN}, "cross_entropy"),
    "classes, uneven": Case(loss="cross_entropy", uneven=True),
    "forward": Case({"fisher": "forward", **GIVEN}),
    "eigen": Case({"inverse": "eigen", "damping": 0.1}),
    "ekfac": Case({"inverse": "ekfac", "inverse_period": 3}),
    "accumulated": Case(micro=3),
    "penalty": Case(penalty=1.0),
    "penalty, uneven": Case(penalty=1.0, uneven=True),
    "noise, uneven": Case(noise=True, uneven=True),
    "shortened, uneven": Case(clip=0.1, uneven=True),
    "noise, classes, memory": Case(loss="cross_entropy", noise=True, inverses="memory"),
    "noise, fsdp": Case(wrapper="fsdp", noise=True),
    "float32": Case(dtype=torch.float32),
    "before SGD": Case(sgd=True),
    "before SGD, memory, clipped, uneven": Case(CLIPPED, sgd=True, inverses="memory", uneven=True),
    "before SGD, half, clipped": Case(CLIPPED, sgd=True, inverses=0.5),
    "before SGD, fsdp, memory": Case(CLIPPED, sgd=True, wrapper="fsdp", inverses="memory"),
    "memory": Case(inverses="memory"),
    "memory, float32": Case(inverses="memory", dtype=torch.float32),
    "memory, given, uneven": Case(GIVEN, inverses="memory", uneven=True),
    "memory, eigen": Case(HELD, inverses="memory"),
    "half, uneven": Case(inverses=0.5, uneven=True),
    "half, uneven, float32": Case(inverses=0.5, uneven=True, dtype=torch.float32),
    "half, eigen, classes": Case(HELD, "cross_entropy", inverses=0.5),
    "fsdp": Case(wrapper="fsdp"),
    "fsdp, given, uneven": Case({**GIVEN, "weight_decay": 0.1}, wrapper="fsdp", uneven=True),
    "fsdp, memory, classes": Case(HELD, "cross_entropy", wrapper="fsdp", inverses="memory"),
    "fsdp, empirical, half": Case({"fisher": "empirical"}, wrapper="fsdp", inverses=0.5),
    "fsdp, float32": Case(dtype=torch.float32, wrapper="fsdp"),
}
QUICK = ["accumulated", "penalty, uneven", "memory, eigen", "half, uneven", "fsdp", "noise, uneven"]
QUICK += ["before SGD, half, clipped", "shortened, uneven"]
FOUR = {"hsdp": Case(wrapper="hsdp"), "hsdp, given": Case(GIVEN, wrapper="hsdp", inverses="memory")}


def train(size: int, cases: list[Case]) -> list[Tensor]:
    some = Ranks.of(size)
    return [Training(case, some, size).steps(0, STEPS).parameters() for case in cases]


@pytest.mark.filterwarnings("ignore:natgrad. the loop's loss has terms:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:natgrad. the gradients of the parameters are less:RuntimeWarning")
@pytest.mark.parametrize(
    ("size", "cases"),
    [
        pytest.param(4, {name: CASES[name] for name in QUICK}, id="some"),
        pytest.param(2, CASES, id="two", marks=pytest.mark.slow),
        pytest.param(4, {**CASES, **FOUR}, id="four", marks=pytest.mark.slow),
    ],
)
def test_ranks_take_the_steps_of_one_process(size: int, cases: dict[str, Case]) -> None:
    each = ranks.run(train, 4, size, list(cases.values()))
    for number, (name, case) in enumerate(cases.items()):
        one = Training(case, None, size).steps(0, STEPS).parameters()
        together = [rank[number] for rank in each]
        assert all(torch.equal(other, together[0]) for other in together), f"{name}: ranks differ"
        off = relative(together[0], one)
        assert off < (1e-5 if case.dtype == torch.float32 else 1e-10), f"{name}: {off:.1e}"
