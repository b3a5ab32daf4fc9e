"""Half precision costs no accuracy of the statistics; batches that overflow under a scaler leave no trace."""

import argparse
import inspect
import typing
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import natgrad
from kfac_cases import assert_same, every_mode, network, train, values
from natgrad.experiments.bench.workloads.language import gpt
from natgrad.state import OF_ALL
from oracle import relative_error

HALF: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "parameters": nullcontext,
}


def data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 3, generator=generator), torch.randint(3, (32,), generator=generator)


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


Loop = Callable[[natgrad.KFAC, torch.amp.GradScaler, int, float], None]


def zeroed_first(optimizer: natgrad.KFAC, scaler: torch.amp.GradScaler, seed: int, factor: float) -> None:
    x, y = data(seed)
    optimizer.zero_grad()
    scaler.scale(factor * cross_entropy(optimizer.preconditioner.model(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()


def zeroed_last(optimizer: natgrad.KFAC, scaler: torch.amp.GradScaler, seed: int, factor: float) -> None:
    """With zeros, and by the model."""
    x, y = data(seed)
    scaler.scale(factor * cross_entropy(optimizer.preconditioner.model(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.preconditioner.model.zero_grad(set_to_none=False)


def clipped(optimizer: natgrad.KFAC, scaler: torch.amp.GradScaler, seed: int, factor: float) -> None:
    x, y = data(seed)
    optimizer.zero_grad()
    scaler.scale(factor * cross_entropy(optimizer.preconditioner.model(x), y)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(optimizer.preconditioner.model.parameters(), 1e6)
    scaler.step(optimizer)
    scaler.update()


def zeroed_in_between(optimizer: natgrad.KFAC, scaler: torch.amp.GradScaler, seed: int, factor: float) -> None:
    """As Lightning does."""
    x, y = data(seed)
    loss = factor * cross_entropy(optimizer.preconditioner.model(x), y)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def trained(loop: Loop, bad: set[int], options: dict[str, Any]) -> tuple[natgrad.KFAC, torch.amp.GradScaler]:
    optimizer = natgrad.KFAC(classifier(), "cross_entropy", **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for position in range(8):
        if position in bad:
            loop(optimizer, scaler, 100 + position, torch.inf)
            loop(optimizer, scaler, 200 + position, 3e38)  # overflows only once it is scaled
        loop(optimizer, scaler, position, 1.0)
    return optimizer, scaler


def learnt(optimizer: natgrad.KFAC) -> dict[str, Tensor]:
    """All but the multipliers, which know by how much the scaler multiplies."""
    return {name: t for name, t in values(optimizer).items() if not name.endswith(".multiplier")}


@pytest.mark.parametrize("loop", [zeroed_first, zeroed_last, clipped])
@pytest.mark.parametrize("inverse", ["cholesky", "ekfac"])
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_batches_that_overflow_leave_no_trace(loop: Loop, inverse: str, fisher: str) -> None:
    """Bitwise: the scaler's factors are powers of two, and no draw is spent on a batch that was thrown away."""
    options = {"inverse": inverse, "fisher": fisher, "factor_decay": 0.9}
    plain, _ = trained(loop, set(), options)
    spoilt, scaler = trained(loop, {0, 3, 4}, options)
    assert scaler.get_scale() == 2.0**4
    assert_same(learnt(spoilt), learnt(plain))
    assert spoilt.preconditioner.steps + spoilt.undone_steps == 8


def test_a_batch_thrown_away_after_the_next_forward_pass_does_not_count() -> None:
    """Its statistics go, though the draw for the next batch is another one then: with an exact Fisher there is none."""
    options: dict[str, Any] = {"fisher": "exact", "factor_decay": 0.9}
    plain, _ = trained(zeroed_in_between, set(), options)
    spoilt, _ = trained(zeroed_in_between, {0, 3, 4}, options)
    assert_same(learnt(spoilt), learnt(plain))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_accumulated_batches_all_count(fisher: str) -> None:
    """The rule that drops statistics without a gradient must not drop those whose gradient is still there."""
    options = {"fisher": fisher, "batch_fraction": 1.0, "damping": (0.1, 0.1)}
    whole, parts = (natgrad.KFAC(classifier(), "cross_entropy", **options) for _ in range(2))
    for seed in range(3):
        x, y = data(seed)
        for optimizer, pieces in ((whole, 1), (parts, 4)):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                (cross_entropy(optimizer.preconditioner.model(a), b) / pieces).backward()
        for name, one in whole.preconditioner.factors().items() if seed else ():
            other = parts.preconditioner.factors()[name]
            assert all(relative_error(o, w) < 1e-4 for o, w in zip(other, one, strict=True))
        whole.preconditioner.update()
        parts.preconditioner.update()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_preconditioner_and_a_scaler(enabled: bool) -> None:
    """The preconditioner comes between `unscale_` and the optimizer's step, and sees the overflow itself."""
    runs = []
    for bad in (set(), {0, 2}):
        model = classifier()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        preconditioner = natgrad.Preconditioner(model, "cross_entropy", factor_decay=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000, enabled=enabled)
        for position in range(5):
            for seed, factor in [*([(100 + position, torch.inf)] if position in bad else []), (position, 1.0)]:
                x, y = data(seed)
                sgd.zero_grad()
                scaler.scale(factor * cross_entropy(model(x), y)).backward()
                scaler.unscale_(sgd)
                assert preconditioner.step() == (factor == 1.0)
                scaler.step(sgd)
                scaler.update()
        runs.append({n: p.detach() for n, p in model.named_parameters()})
    assert_same(runs[1], runs[0])


@every_mode
def test_a_double_precision_run_is_one_throughout(mode: dict[str, Any]) -> None:
    """Numbers about the whole network apart, nothing is rounded to less."""
    optimizer = natgrad.KFAC(network(torch.float64), "mse", **mode)
    train(optimizer, 0, 1, 2)
    small = {n.rpartition(".")[2] for n, t in values(optimizer).items() if t.dtype != torch.float64}
    assert small <= {"step", "rows", "moved", *OF_ALL}
    outside = values(optimizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        train(optimizer, 3)
    assert all(t.dtype == outside.get(n, t).dtype for n, t in values(optimizer).items())


@pytest.mark.parametrize("half", HALF)
def test_statistics_of_half_precision_are_single(half: str) -> None:
    """The factors of rounded activations, not rounded factors: no entry would agree to 1e-5 otherwise."""
    model = classifier().to(torch.bfloat16 if half == "parameters" else torch.float32)
    optimizer = natgrad.KFAC(model, "cross_entropy", batch_fraction=1.0, lr=0.1, momentum=0.9)
    x, y = data(0)
    inputs: list[Tensor] = []
    model[3].register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    with HALF[half]():
        cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()
    optimizer.step()
    rows = torch.cat([inputs[0].float(), torch.ones(32, 1)], dim=1)
    A, G = optimizer.preconditioner.factors()["3"]
    assert relative_error(A, rows.T @ rows / 32) < 1e-6
    assert {A.dtype, G.dtype, optimizer.state[model[3].weight]["velocity"].dtype} == {torch.float32}


class Residual(nn.Module):
    """A residual network that adds to its hidden units in place; autograd allows that where it keeps a cast of them."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).float()
        d = 10 * self.inner(h).float()
        out: Tensor = self.last(h.add_(d) if self.in_place else h + d)
        return out.float()


def test_inputs_are_those_that_a_layer_saw_though_the_network_writes_to_them() -> None:
    factors = []
    for in_place in (False, True):
        model = Residual(in_place)
        preconditioner = natgrad.Preconditioner(model, "mse")
        with torch.autocast("cpu", torch.bfloat16):
            out = model(torch.linspace(-1, 1, 32).reshape(8, 4))
        mse_loss(out, torch.ones(8, 2)).backward()
        preconditioner.step()
        factors.append(preconditioner.factors()["inner"][0])
    assert torch.equal(factors[1], factors[0])


def test_products_of_rows_in_half_precision_are_single() -> None:
    """Those of a normalization's gradients and inputs: rounded, G would be a thousandth off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(torch.bfloat16)
    preconditioner = natgrad.Preconditioner(model, "cross_entropy", fisher="empirical")
    seen = list[Tensor]()
    model[1].register_forward_hook(lambda module, args, out: seen.append(nn.functional.layer_norm(args[0], (5,))))
    model[1].register_full_backward_hook(lambda module, into, out: seen.append(out[0]))
    x, y = torch.randn(40, 6).bfloat16(), torch.randint(3, (40,))
    cross_entropy(model(x), y).backward()
    preconditioner.step()
    normalized, g = (t.detach().float() for t in seen)
    rows = torch.cat([g * normalized, g], dim=1)
    _, G = preconditioner.factors()["1"]
    assert relative_error(G, 40 * rows.T @ rows) < 1e-5


def gpt_after(steps: int, half: bool) -> float:
    """Held-out loss of a small GPT on sources of the standard library, after so many steps of plain `KFAC`."""
    text = "".join(inspect.getsource(module) for module in (argparse, typing))
    text = "".join(c for c in text if c.isascii())
    workload = gpt("gpt", 1.0, text, width=32, blocks=1)
    model, batches = workload.model(0), workload.batches(0)
    optimizer = natgrad.KFAC(model, "cross_entropy")
    for _ in range(steps):
        x, y = next(batches)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = workload.loss(model(x), y)
        loss.backward()
        optimizer.step()
    return workload.evaluate(model)["loss"]


@pytest.mark.slow
def test_a_gpt_learns_as_well_under_autocast() -> None:
    single, half = gpt_after(200, half=False), gpt_after(200, half=True)
    assert single < 2.6  # from log 97 = 4.6
    assert half < 1.03 * single  # rounding alone may bring it 5 % below, as another seed would


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_half_precision_may_rely_on_autocast(dtype: torch.dtype) -> None:
    """natgrad's own passes are without it, and would not multiply them with weights of single precision."""
    model = classifier()
    optimizer = natgrad.KFAC(model, "cross_entropy")
    x, y = data(0)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = cross_entropy(model(x.to(dtype)).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("whole", [True, False])
def test_a_step_under_autocast_is_that_without(whole: bool) -> None:
    """Catches inverses multiplied, and the model run once more, in half precision."""
    moved = []
    for step in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        x, y = torch.randn(300, 6), torch.randint(3, (300,))
        optimizer = natgrad.KFAC(model, "cross_entropy") if whole else natgrad.Preconditioner(model, "cross_entropy")
        for _ in range(3):
            model.zero_grad()
            cross_entropy(model(x), y).backward()
            with step:
                optimizer.step()
        moved.append(torch.cat([(p if whole else p.grad).detach().flatten() for p in model.parameters()]))
    assert torch.equal(*moved)


def test_inputs_of_half_precision_stay_where_parameters_are_of_both() -> None:
    """A scale in single precision before layers in half; catches inputs that are as wide as the first parameter."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float32))
            self.body = classifier().to(torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.scale * self.body(x)
            return output

    model = Scaled()
    optimizer = natgrad.KFAC(model, "cross_entropy")
    x, y = data(0)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(x.bfloat16()), y).backward()
        optimizer.step()
    assert optimizer.diagnostics()["lr"] > 0
