"""What torch asks of every optimizer, asked of KFAC; state, groups and copies have files of their own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import lr_scheduler

import natgrad
from kfac_cases import AUTO, NUMERIC, assert_same, batch, every_mode, network, train, values

pytestmark = pytest.mark.usefixtures("float64")


def test_step_hooks_run_around_each_step() -> None:
    optimizer, order = natgrad.KFAC(network(), "mse"), list[str]()
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: order.append("before"))
    handle = optimizer.register_step_post_hook(lambda opt, args, kwargs: order.append("after"))
    train(optimizer, 0)
    handle.remove()
    train(optimizer, 1)
    assert order == ["before", "after", "before"]


def test_the_profiler_names_the_step() -> None:
    optimizer = natgrad.KFAC(network(), "mse")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, 0)
    assert "Optimizer.step#KFAC.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("to_none", [True, False])
@every_mode
def test_zeroing_leaves_nothing_behind(mode: dict[str, Any], to_none: bool) -> None:
    plain, other = (natgrad.KFAC(network(), "mse", **mode) for _ in range(2))
    for seed in range(3):
        train(plain, seed)
        x, y = batch(seed)
        other.zero_grad(set_to_none=to_none)
        mse_loss(other.preconditioner.model(x), y).backward()
        other.step()
    other.zero_grad(set_to_none=to_none)
    gradients = [p.grad for p in other.preconditioner.model.parameters()]
    assert all(g is None if to_none else not g.any() for g in gradients)
    assert_same(values(other), values(plain))


@every_mode
def test_forward_before_zeroing_is_the_same(mode: dict[str, Any]) -> None:
    """As tutorials and Lightning have it: forward, zero, backward, step."""
    plain, other = (natgrad.KFAC(network(), "mse", **mode) for _ in range(2))
    for seed in range(4):
        train(plain, seed)
        x, y = batch(seed)
        loss = mse_loss(other.preconditioner.model(x), y)
        other.zero_grad()
        loss.backward()
        other.step()
    assert_same(values(other), values(plain))


@pytest.mark.parametrize("mode", [NUMERIC, AUTO], ids=str)
def test_a_closure_that_zeroes_and_returns_the_loss(mode: dict[str, Any]) -> None:
    optimizer = natgrad.KFAC(network(), "mse", **mode)
    model, (x, y) = optimizer.preconditioner.model, batch(0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(12)]
    assert losses[-1] < losses[0] / 2


SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, 0.5),
    "Cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "Linear": lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=5),
    "Warmup": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.01, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.9)], [3]
    ),
    "OneCycle": lambda opt: lr_scheduler.OneCycleLR(opt, 0.2, total_steps=10, cycle_momentum=False),
    "Cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.2, 3, cycle_momentum=False),
    "Lambda": lambda opt: lr_scheduler.LambdaLR(opt, [lambda n: 1 / (n + 1)] * len(opt.param_groups)),
    "Chained": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.5, 2), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in")
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("mode", [NUMERIC, AUTO], ids=str)
def test_schedulers_set_rates_as_for_any_optimizer(make: Any, mode: dict[str, Any]) -> None:
    optimizer = natgrad.KFAC(network(), "mse", **mode)
    other = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": g["lr"]} for g in optimizer.param_groups])
    schedulers = make(optimizer), make(other)
    for seed in range(6):
        train(optimizer, seed)
        other.step()
        for scheduler in schedulers:
            scheduler.step()
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other.param_groups]


def test_a_plateau_scheduler_lowers_the_rate() -> None:
    optimizer = natgrad.KFAC(network(), "mse", **NUMERIC)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    for _ in range(3):
        train(optimizer, 0)
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("mode", [NUMERIC, AUTO], ids=str)
def test_a_rate_may_be_a_tensor(mode: dict[str, Any]) -> None:
    plain, other = (natgrad.KFAC(network(), "mse", **mode) for _ in range(2))
    for group in other.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    train(plain, 0, 1)
    train(other, 0, 1)
    for name, tensor in values(plain).items():
        torch.testing.assert_close(values(other)[name], tensor, rtol=1e-10, atol=1e-12)


def test_weights_are_averaged_by_torchs_tool() -> None:
    """`AveragedModel` copies the model with its hooks, and natgrad must neither see nor disturb the copy."""
    optimizer = natgrad.KFAC(network(), "mse")
    model = optimizer.preconditioner.model
    average = torch.optim.swa_utils.AveragedModel(model)
    plain = natgrad.KFAC(network(), "mse")
    for seed in range(3):
        train(optimizer, seed)
        average.update_parameters(model)
        average(batch(seed)[0]).sum().backward()
        train(plain, seed)
    assert_same(values(optimizer), values(plain))


def test_one_loss_module_for_two_models() -> None:
    """Each optimizer learns of its own model's targets only."""
    criterion = nn.CrossEntropyLoss(ignore_index=0)
    optimizers = [natgrad.KFAC(network(), criterion) for _ in range(2)]
    alone = natgrad.KFAC(network(), nn.CrossEntropyLoss(ignore_index=0))
    y = torch.tensor([0, 1, 1, 0, 1, 1])
    for seed in range(2):
        for optimizer, loss in [*((o, criterion) for o in optimizers), (alone, alone.preconditioner.loss.function)]:
            optimizer.zero_grad()
            loss(optimizer.preconditioner.model(batch(seed)[0]), y).backward()
            optimizer.step()
    for optimizer in optimizers:
        assert_same(values(optimizer), values(alone))


def test_an_output_without_a_gradient_is_none_of_ours() -> None:
    optimizer = natgrad.KFAC(network(), "mse")
    model = optimizer.preconditioner.model
    model.requires_grad_(False)
    model(batch(0)[0])
    model.requires_grad_(True)
    plain = natgrad.KFAC(network(), "mse")
    train(optimizer, 0)
    train(plain, 0)
    assert_same(values(optimizer), values(plain))


@pytest.mark.filterwarnings("ignore:natgrad. the gradients of the parameters are less:RuntimeWarning")
@pytest.mark.parametrize("task", ["mse", "cross_entropy"])
def test_clipped_gradients_shorten_the_step_and_no_more(task: str) -> None:
    """The step is as much shorter as the gradient: clipping is neither a scaler nor a smaller loss."""
    steps = []
    for bound in (0.1, 0.01):
        optimizer = natgrad.KFAC(network(), task, damping=0.1, inverse="eigen")
        model, (x, y) = optimizer.preconditioner.model, batch(0)
        target = y if task == "mse" else torch.arange(6) % 2
        (mse_loss if task == "mse" else cross_entropy)(model(x), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), bound)
        length = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        before = model[0].weight.detach().clone()
        optimizer.step()
        steps.append((model[0].weight.detach() - before) / length)
        assert optimizer.diagnostics()["halvings"] == 0
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-9, atol=0)


class Owner(nn.Module):
    """Computes its own loss, of outputs moved by one position, and returns several things, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": cross_entropy(logits[:, :-1].transpose(1, 2), y), "logits": logits, "x": x}


def moved(out: Any) -> Tensor:
    return out["logits"][:, :-1].transpose(1, 2)


def test_a_model_that_computes_its_own_loss_takes_the_same_steps() -> None:
    """Its gradient arrives at the logits, and never at what `output=` makes of them."""
    inside = natgrad.KFAC(Owner(), "cross_entropy", output=moved, batch_fraction=1.0)
    outside = natgrad.KFAC(
        Owner().body, "cross_entropy", output=lambda z: z[:, :-1].transpose(1, 2), batch_fraction=1.0
    )
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(6, 5, 3, generator=generator), torch.randint(2, (6, 4), generator=generator)
        inside.zero_grad()
        inside.preconditioner.model(x, y)["loss"].backward()
        inside.step()
        outside.zero_grad()
        cross_entropy(outside.preconditioner.model(x)[:, :-1].transpose(1, 2), y).backward()
        outside.step()
        for one, other in zip(
            inside.preconditioner.model.parameters(), outside.preconditioner.model.parameters(), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert inside.diagnostics()["lr"] > 0
