"""Parameter groups of KFAC: what is trained, by whom, at which rate; and what is refused."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from kfac_cases import AUTO, NUMERIC, assert_same, backward, batch, network, train, values
from natgrad.groups import FALLBACK_RATE
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")


def moved(optimizer: natgrad.KFAC, before: dict[str, Tensor]) -> set[str]:
    names = dict(optimizer.preconditioner.model.named_parameters())
    return {n for n, t in values(optimizer).items() if n in names and not torch.equal(t, before[n])}


def steps_of(optimizer: natgrad.KFAC, *seeds: int) -> dict[str, Tensor]:
    before = values(optimizer)
    train(optimizer, *seeds)
    return {n: p.detach() - before[n] for n, p in optimizer.preconditioner.model.named_parameters()}


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """As most training scripts have it: weights decay, biases do not. A layer is then in two groups."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if n.endswith("weight")], "weight_decay": 0.5},
        {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("given", [lambda m: m.parameters(), lambda m: m.named_parameters(), decay_groups])
def test_every_way_to_name_all_parameters_trains_them_alike(given: Any) -> None:
    plain = natgrad.KFAC(network(), "mse", **NUMERIC)
    model = network()
    other = natgrad.KFAC(model, "mse", params=given(model), **NUMERIC)
    for group in other.param_groups:
        group["weight_decay"] = 0.0
    train(plain, 0, 1, 2)
    train(other, 0, 1, 2)
    assert_same(values(other), values(plain))
    assert [name for group in other.param_groups for name in group["param_names"]]
    for group in other.param_groups:
        assert [model.get_parameter(name) for name in group["param_names"]] == group["params"]


@pytest.mark.parametrize("mode", [NUMERIC, AUTO], ids=str)
def test_each_group_decays_by_its_own_weight(mode: dict[str, Any]) -> None:
    steps = []
    for weight_decay in (0.0, 0.5):
        model = network()
        groups = decay_groups(model)
        groups[0]["weight_decay"] = weight_decay
        optimizer = natgrad.KFAC(model, "mse", params=groups, **mode)
        steps.append(steps_of(optimizer, 0))
        rate = optimizer.diagnostics()["lr"]
    without, with_decay = steps
    start = dict(network().named_parameters())
    for name in ("0.weight", "3.weight"):
        shrunk = math.expm1(-rate * 0.5) * start[name].detach()
        assert relative_error(with_decay[name] - without[name], shrunk) < 1e-9
    for name in ("0.bias", "3.bias"):
        assert torch.equal(with_decay[name], without[name])


def test_a_numeric_rate_is_the_groups_own() -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[3].parameters()}]
    slow = steps_of(natgrad.KFAC(model, "mse", params=groups, lr=0.1, momentum=0.9), 0)
    plain = steps_of(natgrad.KFAC(network(), "mse", lr=0.1, momentum=0.9), 0)
    for name in ("0.weight", "0.bias"):
        assert relative_error(slow[name], 0.1 * plain[name]) < 1e-9
    for name in ("3.weight", "3.bias"):
        assert relative_error(slow[name], plain[name]) < 1e-12
    assert not slow["1.weight"].any()  # in no group


def test_an_automatic_rate_is_the_best_one_for_steps_that_are_so_related() -> None:
    """The first step has no momentum: α is gᵀd / dᵀBd for the direction d that the groups' rates make of Δ."""
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.25}, {"params": model[3].parameters(), "lr": 0.5}]
    optimizer = natgrad.KFAC(model, "mse", params=groups)
    backward(model, 0)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    before = values(optimizer)
    optimizer.step()
    step = {n: p.detach() - before[n] for n, p in model.named_parameters() if not n.startswith("1")}
    natural = {
        n: d for p, d in optimizer.preconditioner.directions().items() for n, q in model.named_parameters() if p is q
    }
    ratios = {n: float(torch.sum(step[n] * natural[n]) / natural[n].square().sum()) for n in step}
    assert ratios["0.weight"] == pytest.approx(ratios["3.weight"] / 2)
    direction = {n: d / 0.5 for n, d in step.items()}  # what the largest rate, 0.5, multiplied
    start = {n: before[n] for n in step}

    def output(theta: dict[str, Tensor]) -> Tensor:
        rest = {n: before[n] for n in ("1.weight",)}
        return torch.func.functional_call(model, {**theta, **rest}, (batch(0)[0],))

    _, Jd = torch.func.jvp(output, (start,), (direction,))
    slope = sum(float(torch.sum(gradients[n] * direction[n])) for n in direction)
    curvature = 2 * float(Jd.square().mean())  # of the mean squared error
    assert -slope == pytest.approx(curvature, rel=1e-6)


def test_kl_clip_bounds_the_step_of_all_groups_together() -> None:
    """Σ lr² gᵀΔ over the groups; one rate for all would be far off here."""
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[3].parameters(), "lr": 3.0}]
    optimizer = natgrad.KFAC(model, "mse", params=groups, momentum=0.0, lr=1.0, kl_clip=1e-4, damping=1e-3)
    backward(model, 0)
    gradients = {p: p.grad.clone() for p in model.parameters()}
    before = {p: p.detach().clone() for p in model.parameters()}
    optimizer.step()
    natural = optimizer.preconditioner.directions()
    squared, scales = 0.0, []
    for group in optimizer.param_groups:
        for p in group["params"]:
            scales.append(float((before[p] - p.detach()).norm() / (group["lr"] * natural[p].norm())))
            squared += group["lr"] ** 2 * float(torch.sum(gradients[p] * natural[p]))
    assert scales == pytest.approx([scales[0]] * 4, rel=1e-9)
    assert scales[0] ** 2 * squared == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("mode", [NUMERIC, AUTO], ids=str)
def test_an_unfrozen_layer_joins_and_is_trained_by_kfac(mode: dict[str, Any]) -> None:
    """The first layer comes last: what all layers share, such as the number of the step, must move to it."""
    model = network()
    model[0].requires_grad_(False)
    optimizer = natgrad.KFAC(model, "mse", **mode)
    before = values(optimizer)
    train(optimizer, 0, 1)
    assert moved(optimizer, before) == {"1.weight", "3.weight", "3.bias"}
    known = optimizer.state[model[3].weight].get("multiplier")
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.5})
    assert optimizer.preconditioner.steps == 2
    if known is not None:
        assert torch.equal(optimizer.state[model[0].weight]["multiplier"], known)
        assert "multiplier" not in optimizer.state[model[3].weight]
    before = values(optimizer)
    train(optimizer, 2)
    assert moved(optimizer, before) == set(dict(model.named_parameters()))
    assert {"A", "G", "A_inverse"} <= optimizer.state[model[0].weight].keys()
    assert "exp_avg" not in optimizer.state[model[0].weight]
    train(optimizer, 3, 4)
    assert optimizer.preconditioner.steps + optimizer.undone_steps == 5


def test_a_layer_that_joins_takes_no_momentum_from_the_others() -> None:
    models = [network(), network()]
    for model in models:
        model[0].requires_grad_(False)
    optimizers = [natgrad.KFAC(model, "mse", damping=0.1, fisher="exact", **NUMERIC) for model in models]
    for optimizer in optimizers:
        train(optimizer, 0, 1)
    models[1][0].requires_grad_(True)
    optimizers[1].add_param_group({"params": models[1][0].parameters()})
    for optimizer in optimizers:
        train(optimizer, 2)
    assert torch.allclose(models[0][3].weight, models[1][3].weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("mode", [{**NUMERIC, "momentum": 0.0}, AUTO], ids=str)
def test_what_is_frozen_in_mid_run_rests_and_the_others_of_its_layer_are_trained(
    mode: dict[str, Any], frozen: str
) -> None:
    """They stood still as well, with all of training where each layer's bias was frozen."""
    model = network()
    optimizer = natgrad.KFAC(model, "mse", **mode)
    train(optimizer, 0, 1)
    getattr(model[3], frozen).requires_grad_(False)
    before = values(optimizer)
    backward(model, 2)
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model[3].named_parameters()
    }
    optimizer.step()
    assert moved(optimizer, before) == set(dict(model.named_parameters())) - {f"3.{frozen}"}
    state = optimizer.state[model[3].weight]
    V = torch.cat([gradients["weight"], gradients["bias"][:, None]], dim=1)
    natural = state["G_inverse"] @ V @ state["A_inverse"]
    step = {"weight": natural[:, :-1], "bias": natural[:, -1]}
    (other,) = step.keys() - {frozen}
    actual = before[f"3.{other}"] - getattr(model[3], other).detach()
    if mode["lr"] != "auto":
        torch.testing.assert_close(actual, mode["lr"] * step[other], rtol=1e-9, atol=1e-12)


def test_layers_left_out_are_left_alone_until_they_are_added() -> None:
    model = network()
    optimizer = natgrad.KFAC(model, "mse", params=model[3].parameters(), **NUMERIC)
    before = values(optimizer)
    train(optimizer, 0)
    assert moved(optimizer, before) == {"3.weight", "3.bias"}
    assert not any(name.startswith("0") for name in optimizer.preconditioner.factors())
    optimizer.add_param_group({"params": model[:2].parameters()})
    train(optimizer, 1)
    assert moved(optimizer, before) == set(dict(model.named_parameters()))
    assert [group["fallback"] for group in optimizer.param_groups] == [False, False, True]
    assert optimizer.param_groups[1]["lr"] == NUMERIC["lr"]
    assert optimizer.param_groups[2]["lr"] == FALLBACK_RATE


def test_adamw_trains_a_layer_on_request() -> None:
    """Bitwise as an AdamW of its own with these settings would."""
    model, twin = network(), network()
    settings = {"lr": 0.02, "betas": (0.5, 0.6), "weight_decay": 0.3}
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "fallback": True, **settings}]
    optimizer = natgrad.KFAC(model, "mse", params=groups, **NUMERIC)
    adamw = torch.optim.AdamW(twin[3].parameters(), **settings)
    for seed in range(3):
        twin.load_state_dict(model.state_dict())
        backward(model, seed)
        backward(twin, seed)
        optimizer.step()
        adamw.step()
        assert torch.equal(model[3].weight, twin[3].weight)
        assert torch.equal(model[3].bias, twin[3].bias)


@pytest.mark.parametrize("excluded", [0, 1])
def test_one_projection_of_attention_may_be_left_out(excluded: int) -> None:
    """One of a module's layers watches for all of them; which one must not matter."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    model = Net()
    parts = [
        ["attention.in_proj_weight", "attention.in_proj_bias"],
        ["attention.out_proj.weight", "attention.out_proj.bias"],
    ]
    chosen = [model.get_parameter(name) for name in parts[1 - excluded]]
    optimizer = natgrad.KFAC(model, "mse", params=chosen, **NUMERIC)
    x = torch.randn(5, 3, 4)
    nn.functional.mse_loss(model(x), x).backward()
    before = values(optimizer)
    optimizer.step()
    assert moved(optimizer, before) == set(parts[1 - excluded])
    assert len(optimizer.preconditioner.factors()) == 1


def test_the_preconditioner_leaves_what_is_not_selected() -> None:
    model = network()
    preconditioner = natgrad.Preconditioner(model, "mse")
    preconditioner.select(model[3].parameters())
    backward(model, 0)
    plain = [p.grad.clone() for p in model[:2].parameters()]
    before = model[3].weight.grad.clone()
    preconditioner.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model[:2].parameters(), plain, strict=True))
    assert not torch.equal(model[3].weight.grad, before)
    with pytest.raises(ValueError, match="no layer that natgrad can precondition"):
        preconditioner.select(model[1].parameters())


def test_what_a_group_cannot_be_is_refused_and_nothing_changes() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = natgrad.KFAC(model, "mse", **NUMERIC)
    train(optimizer, 0)
    before, groups = values(optimizer), len(optimizer.param_groups)
    model[0].requires_grad_(True)
    weight = model[0].weight
    cases: list[tuple[Any, type[Exception], str]] = [
        (model[0].parameters(), TypeError, r'must be {"params": …}.*, not a generator'),
        ({"lr": 1.0}, TypeError, r"not only \['lr'\]"),
        ({"params": [weight]}, ValueError, r"layer '0' is trained as a whole, and its parameters of shape \(4,\) are"),
        ({"params": model[3].parameters()}, ValueError, "more than one parameter group"),
        ({"params": [nn.Parameter(torch.zeros(7))]}, ValueError, r"shape \(7,\) is not part of the model"),
        ({"params": model[0].parameters(), "maximize": True}, ValueError, "natgrad minimizes"),
        ({"params": model[0].parameters(), "momentum": 0.5}, ValueError, "`momentum` is the same for all layers"),
        ({"params": model[0].parameters(), "lr": -1.0}, ValueError, "`lr` must be a non-negative number"),
        ({"params": set(model[0].parameters())}, TypeError, "pass a list"),
        ({"params": ["weight"]}, TypeError, "holds str"),
    ]
    for group, error, text in cases:
        with pytest.raises(error, match=text):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == groups
        assert_same(values(optimizer), before)
    with pytest.warns(UserWarning, match="will not be trained"):
        train(optimizer, 1)
    assert torch.equal(model[0].weight, before["0.weight"])


def test_maximize_is_no_keyword() -> None:
    with pytest.raises(TypeError, match="maximize"):
        natgrad.KFAC(network(), "mse", maximize=True)


@pytest.mark.parametrize("mode", [NUMERIC, AUTO], ids=str)
def test_a_rate_of_zero_stops_all_and_training_goes_on_after_it(mode: dict[str, Any]) -> None:
    """As a warm-up starts."""
    optimizer = natgrad.KFAC(network(), "mse", **{**mode, **({"momentum": 0.0} if mode is NUMERIC else {})})
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = values(optimizer)
    train(optimizer, 0)
    assert moved(optimizer, before) == set()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = torch.tensor(rate)
    train(optimizer, 1)
    assert len(moved(optimizer, before)) == 5


class Sum(nn.Module):
    """Two linear layers side by side, so that a squared error is quadratic in all parameters together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x.sin())


def test_the_step_that_was_taken_is_looked_back_at_where_rates_are_uneven() -> None:
    """And not what the rates leave of it; catches trust that is never gathered where a group has a rate of its own."""
    model = Sum()
    groups = [{"params": model.a.parameters(), "lr": 0.5}, {"params": model.b.parameters(), "lr": 0.8}]
    optimizer = natgrad.KFAC(model, "mse", params=groups, batch_fraction=1.0, damping=1.0)
    x, y = torch.randn(40, 3), torch.randn(40, 2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    told = optimizer.diagnostics()
    assert told["previous_change"] == pytest.approx(losses[-1] - losses[-2], rel=1e-8)
    assert told["confirmed"] == pytest.approx(1.0)
    assert told["momentum"] != 0


def test_a_layer_that_is_unfrozen_later_is_told_of_once() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = natgrad.KFAC(model, "mse")
    train(optimizer, 0)
    model[0].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias got a gradient, and will not be trained"):
        train(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, 2)
    other = natgrad.KFAC(model, "mse", params=model[3].parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(other, 1)


def test_a_layer_that_was_replaced_is_told_of() -> None:
    model = network()
    optimizer = natgrad.KFAC(model, "mse", lr=0.1, momentum=0.0)
    train(optimizer, 0)
    model[3] = nn.Linear(4, 2)
    with pytest.warns(UserWarning, match=r"3\.weight, 3\.bias got a gradient, and will not be trained"):
        train(optimizer, 1)


def test_a_layer_that_was_added_is_trained_without_a_word() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = natgrad.KFAC(model, "mse")
    train(optimizer, 0)
    optimizer.add_param_group({"params": model[0].requires_grad_(True).parameters()})
    before = values(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, 1)
    assert "0.weight" in moved(optimizer, before)


def test_options_of_adamw_belong_in_its_group() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"natgrad\.KFAC has no option 'betas'; .*batch_fraction.*\"fallback\": True"):
        natgrad.KFAC(model, "mse", betas=(0.9, 0.99))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"`betas` are AdamW's"):
        natgrad.KFAC(model, "mse", params=[{"params": model.parameters(), "betas": (0.9, 0.99)}])
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "betas": (0.9, 0.99)}]
    assert natgrad.KFAC(model, "mse", params=groups).param_groups[1]["betas"] == (0.9, 0.99)


def test_gradients_of_what_is_not_trained_may_be_anything() -> None:
    """Another optimizer's, or never zeroed: they neither skip a step nor tell of a scaler."""
    trained = []
    for bad in (0.0, torch.nan, 1e30):
        model = network()
        optimizer = natgrad.KFAC(model, "mse", params=model[3].parameters())
        for seed in range(3):
            backward(model, seed)
            model[0].weight.grad.fill_(bad)
            optimizer.step()
        assert optimizer.diagnostics()["skipped_steps"] == 0
        trained.append(values(optimizer))
    assert_same(trained[1], trained[0])
    assert_same(trained[2], trained[0])


def test_a_step_without_gradients_of_what_is_trained_moves_nothing() -> None:
    """As with every optimizer, where two take turns on parts of one model."""
    model = network()
    optimizer = natgrad.KFAC(model, "mse", params=model[3].parameters())
    before = values(optimizer)
    model[0](batch(0)[0]).sum().backward()
    optimizer.step()
    assert_same({n: t for n, t in values(optimizer).items() if n in before}, before)


def test_decay_flips_no_sign() -> None:
    """Automatic rates may be above one: with 1 − rate · decay a large decay makes weights grow."""
    model = network()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = natgrad.KFAC(model, "mse", lr=2.0, momentum=0.0, damping=1e6, weight_decay=3.0)
    train(optimizer, 0)
    for name in ("0.weight", "3.weight"):
        torch.testing.assert_close(model.get_parameter(name), math.exp(-6) * start[name], rtol=1e-2, atol=1e-5)
