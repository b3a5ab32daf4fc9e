"""What ranks send each other, who holds what, and what happens when one of them is missing."""

import itertools
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as tools
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import natgrad
import ranks
from natgrad import trust
from natgrad.damping import Damping
from natgrad.distributed import Piece, deal, holders, pack, unpack
from natgrad.exchange import blank, inverse_pieces
from natgrad.inverses import EkfacInverse
from rank_cases import Case, Ranks, Training, relative

INVERSES = {"comm": "comm", "memory": "memory", "half": 0.5}
WIDTHS = [7, 12, 12, 12, 12, 12, 12, 12, 5]


# One process is enough for these.


@pytest.mark.parametrize(
    ("costs", "most"), [([8, 1, 1, 1, 1, 1, 1, 1, 1], 8), ([1, 2, 3, 4, 5, 6], 7), ([5, 5, 5, 5], 10), ([3], 3)]
)
def test_the_layers_are_dealt_out_evenly(costs: list[float], most: float) -> None:
    owners = deal({str(i): cost for i, cost in enumerate(costs)}, 3)
    loads = [sum(cost for i, cost in enumerate(costs) if owners[str(i)] == rank) for rank in range(3)]
    assert sum(loads) == sum(costs)
    assert max(loads) == most


def test_packing_keeps_what_it_sends_and_sends_half_of_a_symmetric_matrix() -> None:
    torch.manual_seed(0)
    roots = [torch.randn(5, 5), torch.randn(3, 4, 4), torch.randn(1, 1)]
    tensors = [root + root.mT for root in roots] + [torch.randn(3, 2), torch.randn(())]
    pieces = [Piece(t, number < 3) for number, t in enumerate(tensors)]
    sent = pack(pieces)
    assert sent.numel() == 15 + 3 * 10 + 1 + 6 + 1 == sum(piece.entries for piece in pieces)
    arrived = [Piece(torch.full_like(t, torch.nan), symmetric) for t, symmetric in pieces]
    unpack(sent, arrived)
    assert all(torch.equal(there.tensor, here) for there, here in zip(arrived, tensors, strict=True))


@pytest.mark.parametrize(
    ("inverses", "size", "expected"),
    [("comm", 4, 4), ("memory", 4, 1), (0.5, 4, 2), (0.3, 4, 1), (1, 6, 6), (0.99, 6, 3), (1 / 3, 6, 2), (0.1, 1, 1)],
)
def test_the_share_of_holders_is_rounded_down_to_a_divisor(inverses: Any, size: int, expected: int) -> None:
    assert holders(inverses, size) == expected


@pytest.mark.parametrize("inverses", ["speed", 0.0, 1.5, -1, None])
def test_other_shares_are_refused(inverses: Any) -> None:
    with pytest.raises(ValueError, match="`inverses` must be"):
        natgrad.KFAC(natgrad.Distributed(nn.Linear(3, 2), inverses), "mse")


def spread_ekfac() -> str:
    with pytest.raises(ValueError, match="needs the bases on every rank") as raised:
        natgrad.KFAC(natgrad.Distributed(nn.Linear(3, 2), "memory"), "mse", inverse="ekfac")
    return str(raised.value)


def test_describe_plans_traffic() -> None:
    """A is 4 by 4 and G 2 by 2: 10 and 3 entries, and the number of rows."""
    model = nn.Sequential(nn.Linear(3, 2))
    for inverses, entries in (("comm", 14 + 13), ("memory", 14 + 13 + 8), (0.5, 14 + 13 + 13 + 8)):
        described = natgrad.describe(natgrad.Distributed(model, inverses), ranks=4)
        assert described.rows[0].traffic == 4 * entries
        assert f"{4 * entries} B" in str(described)
    assert "traffic" not in str(natgrad.describe(model))


# These need several.


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS)))


def spread(inverses: Any) -> tuple[dict[str, int], int, list[int], float]:
    """Traffic of a second step, bytes of the inverses here, what `describe` says, and what diagnostics tell.

    Without trials of other dampings, each of which sends the inverses once more.
    """
    trust.PATIENCE = 0  # in this process, which ends with the test
    model = DistributedDataParallel(chain())
    wanted = natgrad.Distributed(model, inverses)
    optimizer = natgrad.KFAC(wanted, "mse")
    for _ in range(2):
        optimizer.zero_grad()
        mse_loss(model(torch.randn(16, WIDTHS[0])), torch.randn(16, WIDTHS[-1])).backward()
        optimizer.step()
    states = optimizer.preconditioner.states().values()
    held = sum(t.numel() * 4 for state in states for key, t in state.items() if key.endswith("_inverse"))
    planned = [row.traffic for row in natgrad.describe(wanted).rows]
    return dict(optimizer.preconditioner.world.traffic), held, planned, optimizer.diagnostics()["traffic"]


def draws() -> tuple[list[Tensor], int]:
    """G of the same data on every rank, before it is shared; and the rows of A when it is."""
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 2)))
    preconditioner = natgrad.Preconditioner(model, "mse")
    x = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    loss = mse_loss(model(x), x[:, :2])
    G = preconditioner.capture.ahead[-1].statistics["0", False].G
    own = [torch.empty_like(G) for _ in range(dist.get_world_size())]
    dist.all_gather(own, G)
    loss.backward()
    preconditioner.update()
    return own, preconditioner.batch.rows("0")[0]


class Fork(nn.Module):
    """Of two layers, each rank uses its own."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.ways[dist.get_rank() % 2](x)


def parted() -> str:
    model = DistributedDataParallel(Fork(), find_unused_parameters=True)
    preconditioner = natgrad.Preconditioner(model, "mse")
    mse_loss(model(torch.ones(4, 3)), torch.ones(4, 2)).backward()
    with pytest.raises(RuntimeError, match="ranks: every rank must send data") as raised:
        preconditioner.step()
    return str(raised.value)


def starved() -> str:
    """One rank has no data."""
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 2)))
    optimizer = natgrad.KFAC(model, "mse")
    x = torch.ones(0 if dist.get_rank() == 1 else 4, 3)
    (model(x) - 1).square().sum().backward()
    with pytest.raises(RuntimeError, match="ranks: every rank must send data") as raised:
        optimizer.step()
    return str(raised.value)


def poisoned() -> tuple[int, bool]:
    """One rank's NaN makes all of them skip the step."""
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 2)))
    optimizer = natgrad.KFAC(model, "mse")
    x = torch.full((4, 3), torch.nan if dist.get_rank() == 1 else 1.0)
    before = [p.detach().clone() for p in model.parameters()]
    mse_loss(model(x), torch.ones(4, 2)).backward()
    optimizer.step()
    same = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    return optimizer.preconditioner.skipped_steps, same


class Host(nn.Module):
    """Calls a model that is no part of it."""

    def __init__(self, guest: nn.Module) -> None:
        super().__init__()
        self.own, self.guests = nn.Linear(2, 2), [guest]

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.guests[0](x))


def wrapped_elsewhere() -> dict[str, str]:
    """What is said, if anything, where the wrapper is not what natgrad was given."""
    said = {}
    singles = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    for name in ("whole", "part", "declared", "not called", "host", "of one rank"):
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        given: Any = {"part": model[0], "declared": natgrad.Distributed(model)}.get(name, model)
        optimizer = natgrad.KFAC(given, "mse")
        group = singles[dist.get_rank()] if name == "of one rank" else None
        wrapper = DistributedDataParallel(Host(model) if name == "host" else model, process_group=group)
        with torch.no_grad():
            wrapper(torch.ones(4, 3))  # nothing is averaged
        said[name] = ""
        try:
            (wrapper.module if name == "not called" else wrapper)(torch.ones(4, 3))
        except RuntimeError as error:
            said[name] = str(error)
        del optimizer
    return said


def all_of_it() -> dict[str, Any]:
    told: dict[str, Any] = {name: spread(inverses) for name, inverses in INVERSES.items()}
    refused = {"parted": parted(), "starved": starved(), "poisoned": poisoned(), "wrapped": wrapped_elsewhere()}
    return {**told, **refused, "draws": draws(), "ekfac": spread_ekfac()}


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    return ranks.run(all_of_it, 4)


@pytest.mark.parametrize("name", INVERSES)
def test_traffic_is_what_describe_says(told: list[dict[str, Any]], name: str) -> None:
    """Messages in a row of the grid are seen by its ranks, all others by every rank."""
    for traffic, _, planned, total in (rank[name] for rank in told):
        assert traffic["numbers"] < 4096
        assert total == sum(traffic.values())
        inverses = sum(rank[name][0].get("inverses", 0) for rank in told) // (2 if name == "half" else 4)
        others = sum(size for what, size in traffic.items() if what not in ("numbers", "inverses"))
        assert inverses + others == sum(planned)


@pytest.mark.parametrize(("name", "least", "most"), [("comm", 1.0, 1.0), ("half", 0.45, 0.55), ("memory", 0.2, 0.3)])
def test_inverses_are_where_they_are_to_be(told: list[dict[str, Any]], name: str, least: float, most: float) -> None:
    whole = sum(4 * ((a + 1) ** 2 + b**2) for a, b in itertools.pairwise(WIDTHS))
    shares = [rank[name][1] / whole for rank in told]
    assert least <= min(shares) <= max(shares) <= most, shares


def test_every_rank_draws_for_itself_and_no_more_than_its_share(told: list[dict[str, Any]]) -> None:
    own, rows = told[0]["draws"]
    assert all(not torch.equal(one, other) for i, one in enumerate(own) for other in own[:i])
    assert rows == 1200  # half of the inputs that all have


def test_ranks_that_use_other_layers_are_told_so_everywhere(told: list[dict[str, Any]]) -> None:
    assert {rank["parted"] for rank in told} == {told[0]["parted"]}
    assert re.match(r"data of layer 'ways.0' came on 2 of 4 ranks", told[0]["parted"])


def test_a_rank_without_data_is_told_of_everywhere(told: list[dict[str, Any]]) -> None:
    """Catches an error on that rank alone, and others that wait for it."""
    assert {rank["starved"] for rank in told} == {told[0]["starved"]}
    assert told[0]["starved"].startswith("a backward pass of data came on 3 of 4 ranks")


def test_a_wrapper_that_natgrad_does_not_know_is_refused(told: list[dict[str, Any]]) -> None:
    """Ranks drifted apart without a word; only where gradients are averaged is there something to say."""
    for rank in told:
        refused = {name for name, text in rank["wrapped"].items() if text}
        assert refused == {"whole", "part"}
        assert "Give natgrad the wrapper in place of the model, or `natgrad.Distributed" in rank["wrapped"]["whole"]


def test_a_bad_batch_on_one_rank_is_skipped_by_all(told: list[dict[str, Any]]) -> None:
    assert [rank["poisoned"] for rank in told] == [(1, True)] * 4


# Another number of ranks goes on.

ELASTIC = [
    Case(),
    Case({"curvature_period": 1, "inverse_period": 1}, inverses="memory"),
    Case({"inverse": "eigen", "damping": 0.1}, inverses=0.5),
]


def start() -> list[Any]:
    runs = [Training(case, Ranks.of(4), 4).steps(0, 5) for case in ELASTIC]
    return [(run.model.state_dict(), run.optimizer.state_dict()) for run in runs]


def go_on(saved: list[Any], size: int) -> list[Tensor]:
    finished = []
    for case, (parameters, state) in zip(ELASTIC, saved, strict=True):
        run = Training(case, Ranks.of(size) if size > 1 else None, 4 if size == 1 else size)
        run.model.load_state_dict(parameters)
        run.optimizer.load_state_dict(state)
        finished.append(run.steps(5, 10).parameters())
    return finished


@pytest.mark.slow
def test_a_checkpoint_of_four_ranks_is_resumed_by_two_and_by_one() -> None:
    """Of the rank that wrote it there are only its own inverses."""
    saved = ranks.run(start, 4)[0]
    expected = [Training(case, None, 4).steps(0, 10).parameters() for case in ELASTIC]
    for resumed in (ranks.run(go_on, 2, saved, 2)[0], go_on(saved, 1)):
        for actual, one in zip(resumed, expected, strict=True):
            assert relative(actual, one) < 1e-10


WRITTEN = {
    "memory": Case({"curvature_period": 1, "inverse_period": 1}, inverses="memory"),
    "fsdp": Case(wrapper="fsdp"),
}


def state_of(run: Training) -> dict[str, Any]:
    model, optimizer = tools.get_state_dict(run.trained, run.optimizer)
    return {"model": model, "optimizer": optimizer}


def write(folder: str) -> list[Tensor]:
    """Three steps, a checkpoint, and what two more lead to."""
    reached = []
    for name, case in WRITTEN.items():
        run = Training(case, Ranks.of(2), 2).steps(0, 3)
        dcp.save(state_of(run), checkpoint_id=f"{folder}/{name}")
        reached.append(run.steps(3, 5).parameters())
    return reached


def read(folder: str, size: int) -> list[Tensor]:
    reached = []
    for name, case in WRITTEN.items():
        run = Training(case, Ranks.of(size), size)
        state = state_of(run)
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        tools.set_state_dict(
            run.trained, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        reached.append(run.steps(3, 5).parameters())
    return reached


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_distributed_checkpoint_is_resumed(size: int, tmp_path: pathlib.Path) -> None:
    """Torch takes each tensor that is not sharded from any rank, in memory mode also halves of inverses.

    The same ranks go on bitwise, others to rounding.
    """
    expected = ranks.run(write, 2, str(tmp_path))[0]
    for rank in ranks.run(read, size, str(tmp_path), size):
        for actual, one in zip(rank, expected, strict=True):
            assert torch.equal(actual, one) if size == 2 else relative(actual, one) < 1e-10


# A rank is missing.


def leave(dies: bool) -> tuple[str, float]:
    """What the ranks that are left get, and after how long."""
    model = DistributedDataParallel(chain())
    optimizer = natgrad.KFAC(natgrad.Distributed(model, "memory"), "mse")
    for step in range(3):
        optimizer.zero_grad()
        mse_loss(model(torch.ones(4, WIDTHS[0])), torch.ones(4, WIDTHS[-1])).backward()
        if step == 2 and dist.get_rank() == 1:
            if dies:
                os._exit(0)
            time.sleep(12)
            return "late", 0.0
        started = time.monotonic()
        try:
            optimizer.step()
        except RuntimeError as error:
            return type(error).__name__, time.monotonic() - started
    return "nothing", 0.0


@pytest.mark.parametrize("dies", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_others_fail_within_the_timeout(dies: bool) -> None:
    for error, seconds in ranks.run(leave, 2, dies, timeout=6):
        assert error != "nothing"
        assert seconds < 10


def test_the_example_runs() -> None:
    """To its end; as they exit, torch's threads abort now and then, with any optimizer."""
    script = pathlib.Path(__file__).parent.parent / "examples" / "ddp.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 20, done.stderr
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr
    assert losses[-1] < losses[0] / 2


def test_an_age_is_not_sent_with_tensors_of_the_device() -> None:
    """It is a number on the CPU, and one wherever it would be sent."""
    inverse = EkfacInverse()
    state = {"A": torch.eye(3, dtype=torch.float32), "G": torch.eye(2, dtype=torch.float32)}
    owned = inverse.factorize(**state, damping=Damping(0.1, 0.1))
    assert {t.shape for t in owned.values()} - {p.tensor.shape for p in inverse_pieces(inverse.names, owned)} == {()}
    room = blank(inverse.names, {name: factor.to("meta") for name, factor in state.items()})
    assert {name for name, t in room.items() if t.device.type == "cpu"} == {"spectrum_age"}
    assert torch.equal(room["spectrum_age"], owned["spectrum_age"])
    assert {n: (t.shape, t.dtype) for n, t in room.items()} == {n: (t.shape, t.dtype) for n, t in owned.items()}
