"""What the optimizer tells of itself, against dense computation and against what is seen from outside."""

import inspect
import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import natgrad
from kfac_cases import AUTO, NUMERIC, backward, every_mode, network, train, values
from layer_modules import normalized
from natgrad import diagnostics
from natgrad.damping import Damping
from natgrad.inverses import INVERSES

pytestmark = pytest.mark.usefixtures("float64")
LAYERS = ("0", "3")  # of `network`


def factor(values: list[float], seed: int) -> Tensor:
    """Dense, with these eigenvalues."""
    d = len(values)
    Q, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))
    return Q @ torch.tensor(values).diag() @ Q.mT


def spread(M: Tensor) -> float:
    eigenvalues = torch.linalg.eigvalsh(M)
    return float(eigenvalues[-1] / eigenvalues[0])


def moved(optimizer: natgrad.KFAC, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """One more training step; by parameter name, the step and the parameter after it."""
    named = dict(optimizer.preconditioner.model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    train(optimizer, seed)
    return {name: (p.detach() - before[name], p.detach()) for name, p in named.items()}


# The step.


@every_mode
def test_the_step_is_measured_as_it_was_taken(mode: dict[str, Any]) -> None:
    """Norms and ½ sᵀFs from the parameters before and after, with F written densely over the row-major [W b]."""
    optimizer = natgrad.KFAC(network(), "mse", **mode)
    train(optimizer, 0, 1)
    steps, told = moved(optimizer, 2), optimizer.diagnostics()
    total, length, size = 0.0, 0.0, 0.0
    for name, (A, G) in optimizer.preconditioner.factors().items():
        (W, after_W), (b, after_b) = steps[f"{name}.weight"], steps[f"{name}.bias"]
        s = torch.cat([W, b.unsqueeze(1)], 1).flatten()
        kl = float(s @ torch.kron(G, A) @ s) / 2
        assert told[f"kl_kfac/{name}"] == pytest.approx(kl, rel=1e-9)
        assert told[f"step_norm/{name}"] == pytest.approx(float(s.norm()), rel=1e-9)
        after = (after_W.square().sum() + after_b.square().sum()).sqrt()
        assert told[f"relative_step/{name}"] == pytest.approx(float(s.norm() / after), rel=1e-9)
        total, length, size = total + kl, length + float(s @ s), size + float(after**2)
    assert told["kl_kfac"] == pytest.approx(total, rel=1e-9)
    assert told["step_norm"] == pytest.approx(length**0.5, rel=1e-9)
    assert told["relative_step"] == pytest.approx((length / size) ** 0.5, rel=1e-9)


def test_a_layer_is_told_of_though_its_bias_stays() -> None:
    """That of an energy, whose derivatives are the outputs, has no gradient."""

    class Force(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)[0]

    torch.manual_seed(0)
    model, x = Force(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(20, 2)
    optimizer = natgrad.KFAC(model, "mse")
    before = model[2].weight.detach().clone()
    mse_loss(model(x), x.sin()).backward()
    optimizer.step()
    told = optimizer.diagnostics()
    assert model[2].bias.grad is None
    assert told["step_norm/2"] == pytest.approx(float((model[2].weight.detach() - before).norm()), rel=1e-9)


def test_the_divergence_of_a_newton_step_is_what_the_loss_falls_by() -> None:
    """Of a quadratic loss with its own curvature as block: L(θ) − L(θ*) = ½ sᵀFs, for the blocks and the network."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(20, 3), torch.randn(20, 2)
    optimizer = natgrad.KFAC(model, "mse", fisher="exact", damping=1e-12)
    before = mse_loss(model(x), y)
    before.backward()
    optimizer.step()
    fall = (before - mse_loss(model(x), y)).item()
    told = optimizer.diagnostics()
    assert told["kl"] == pytest.approx(fall, rel=1e-5)
    assert told["kl_kfac"] == pytest.approx(fall, rel=1e-5)
    assert told["kl_kfac/model"] == told["kl_kfac"]


def test_a_weight_normalized_layer_is_measured_by_the_weight_it_computes() -> None:
    """The step of W = g v / ‖v‖, to first order in a short step of g and v."""
    torch.manual_seed(0)
    layer = normalized(nn.Linear(3, 4))
    model, x, y = nn.Sequential(layer, nn.Tanh()), torch.randn(8, 3), torch.randn(8, 4)
    optimizer = natgrad.KFAC(model, "mse", lr=1e-6, momentum=0.9)
    for _ in range(2):
        before = torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1).detach()
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    s = (torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1).detach() - before).flatten()
    A, G = optimizer.preconditioner.factors()["0"]
    assert optimizer.diagnostics()["kl_kfac/0"] == pytest.approx(float(s @ torch.kron(G, A) @ s) / 2, rel=1e-4, abs=0)


# The inverses.


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("damping", [(0.1, 0.02), 0.05, "auto"], ids=str)
def test_condition_numbers_are_those_of_the_damped_block(inverse: str, damping: Any) -> None:
    """From dense eigenvalues of what was applied and of the factors; power iterations miss a tenth at most."""
    preconditioner = natgrad.Preconditioner(network(), "mse", damping=damping, inverse=inverse, factor_decay=0.9)
    for seed in range(3):
        backward(preconditioner.model, seed)
        preconditioner.step()
    told = preconditioner.diagnostics()
    for name, (A, G) in preconditioner.factors().items():
        a, g, delta = (told[f"{key}/{name}"] for key in ("damping_a", "damping_g", "damping"))
        exact = {"condition": spread(dense_inverse(preconditioner, name))}
        if inverse != "ekfac" and delta == 0:
            exact |= {
                "condition_a": spread(A + a * torch.eye(len(A))),
                "condition_g": spread(G + g * torch.eye(len(G))),
            }
        assert {key for key in told if key.startswith("condition") and key.endswith(f"/{name}")} == {
            f"{key}/{name}" for key in exact
        }
        for key, expected in exact.items():
            least = expected * (0.9 if inverse == "cholesky" else 1 - 1e-8)
            assert least <= told[f"{key}/{name}"] <= expected * (1 + 1e-8), key


def dense_inverse(preconditioner: natgrad.Preconditioner, name: str) -> Tensor:
    """What a layer's gradient, as the row-major [W b], is multiplied by."""
    state = preconditioner.states()[name]
    out, width = len(state["G"]), len(state["A"])
    units = torch.eye(out * width).reshape(-1, out, width)
    return torch.stack([preconditioner.metric.inverse.solve(state, unit).flatten() for unit in units])


def test_the_divergence_by_corrected_eigenvalues_is_that_of_the_block_in_use() -> None:
    """EKFAC's block is what its inverse inverts, less the damping."""
    optimizer = natgrad.KFAC(network(), "mse", damping=0.05, inverse="ekfac", inverse_period=5, **NUMERIC)
    train(optimizer, 0, 1)
    steps, told = moved(optimizer, 2), optimizer.diagnostics()
    for name, (A, G) in optimizer.preconditioner.factors().items():
        s = torch.cat([steps[f"{name}.weight"][0], steps[f"{name}.bias"][0].unsqueeze(1)], 1).flatten()
        block = torch.linalg.inv(dense_inverse(optimizer.preconditioner, name)) - 0.05 * torch.eye(len(s))
        assert told[f"kl_kfac/{name}"] == pytest.approx(float(s @ block @ s) / 2, rel=1e-9)
        assert told[f"kl_kfac/{name}"] != pytest.approx(float(s @ torch.kron(G, A) @ s) / 2, rel=1e-3)


@pytest.mark.parametrize("inverse", INVERSES)
def test_condition_numbers_of_blocks_and_diagonals(inverse: str) -> None:
    """Of the worst block: A is worst in the second, the product in the first. A diagonal's are exact."""
    A = torch.stack([factor([1.0, 0.5], 0), factor([3.0, 0.5], 1)])
    G = torch.stack([torch.tensor([[9.0], [1.0], [2.0]]), torch.tensor([[2.0], [4.0], [2.0]])])
    damping = Damping(0.5, 1.0)
    state = {"A": A, "G": G, **INVERSES[inverse].factorize(A, G, damping)}
    told = {key: float(value) for key, value in diagnostics.condition_numbers(state, damping).items()}
    assert told.pop("condition") == pytest.approx(1.5 / 1.0 * 5.0, rel=1e-6)
    factors = {"condition_a": 3.5 / 1.0, "condition_g": 10.0 / 2.0}
    assert told == pytest.approx({} if inverse == "ekfac" else factors, rel=1e-6)


def test_a_largest_eigenvalue_is_found_within_a_tenth() -> None:
    """Even without a gap: 200 eigenvalues that fall evenly."""
    spectrum = torch.linspace(0.01, 1.0, 200).tolist()
    assert 0.9 <= float(diagnostics.largest_eigenvalue(factor(spectrum, 0))) <= 1.0 + 1e-9


def test_directions_that_are_left_out_do_not_count() -> None:
    A, G = factor([4.0, 2.0, 0.0], 0), factor([1.0, 0.5], 1)
    state = {"A": A, "G": G, **INVERSES["eigen"].factorize(A, G, Damping(0.0, 0.0))}
    told = diagnostics.condition_numbers(state, Damping(0.0, 0.0))
    assert {k: float(v) for k, v in told.items()} == pytest.approx(
        {"condition": 4.0, "condition_a": 2.0, "condition_g": 2.0}
    )


def test_the_damping_of_each_layer_is_told() -> None:
    """Split by π: the product of both is δ in every layer, in a proportion of its own; the totals are means."""
    optimizer = natgrad.KFAC(network(), "mse", damping=0.04, **NUMERIC)
    train(optimizer, 0)
    told = optimizer.diagnostics()
    assert [told[f"damping_a/{n}"] * told[f"damping_g/{n}"] for n in LAYERS] == pytest.approx([0.04, 0.04])
    assert told["damping_a/0"] != pytest.approx(told["damping_a/3"], rel=1e-3)
    for key in ("damping_a", "damping_g"):
        assert told[key] == pytest.approx(sum(told[f"{key}/{n}"] for n in LAYERS) / 2)
    exact = natgrad.KFAC(network(), "mse", damping=0.04, inverse="eigen", **NUMERIC)
    train(exact, 0)
    assert [exact.diagnostics()[key] for key in ("damping", "damping/0", "damping/3", "damping_a")] == pytest.approx(
        [0.04, 0.04, 0.04, 0.0]
    )


def test_age_of_the_inverses_counts_steps_and_not_skipped_ones() -> None:
    optimizer = natgrad.KFAC(network(), "mse", inverse_period=3, **NUMERIC)
    ages = []
    for seed in range(7):
        train(optimizer, seed)
        ages.append(optimizer.diagnostics()["inverse_age"])
    assert ages == [0, 1, 2, 0, 1, 2, 0]
    train(optimizer, 7)
    backward(optimizer.preconditioner.model, 8)
    next(optimizer.preconditioner.model.parameters()).grad[0, 0] = torch.nan
    optimizer.step()
    told = optimizer.diagnostics()
    assert (told["inverse_age"], told["inverse_age/3"], told["skipped_steps"]) == (1, 1, 1)


# Asking.


def test_asking_changes_nothing() -> None:
    """Neither parameters and state nor the random stream; nor does the checkpoint know of it."""
    optimizers = [natgrad.KFAC(network(), "mse", **AUTO) for _ in range(2)]
    for seed in range(3):
        for optimizer in optimizers:
            train(optimizer, seed)
        stream = torch.get_rng_state()
        optimizers[0].diagnostics()
        assert torch.equal(torch.get_rng_state(), stream)
    asked, plain = map(values, optimizers)
    assert asked.keys() == plain.keys()
    assert all(torch.equal(asked[name], plain[name]) for name in plain)


def test_a_step_computes_nothing_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number taken off a device waits for it; condition numbers take products."""
    for name in ("of_inverses", "of_step", "summary", "norms", "numbers"):
        monkeypatch.setattr(diagnostics, name, None)
    optimizer = natgrad.KFAC(network(), "mse")
    train(optimizer, 0, 1)
    assert optimizer.preconditioner.steps == 2


def test_without_layers_no_product_with_a_factor_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = natgrad.KFAC(network(), "mse")
    train(optimizer, 0, 1)
    every = optimizer.diagnostics()
    monkeypatch.setattr(diagnostics, "apply", None)
    monkeypatch.setattr(diagnostics, "largest_eigenvalue", None)
    assert optimizer.diagnostics(per_layer=False) == {
        key: value for key, value in every.items() if "/" not in key and key != "kl_kfac"
    }


def test_before_the_first_step_and_after_loading_there_is_little_to_tell() -> None:
    optimizer, other = (natgrad.KFAC(network(), "mse", inverse_period=2) for _ in range(2))
    nothing = {"skipped_steps": 0.0, "undone_steps": 0.0}
    assert optimizer.diagnostics() == nothing
    train(optimizer, 0)
    train(other, 0)
    other.load_state_dict(optimizer.state_dict())
    assert other.diagnostics() == nothing
    train(other, 1, 2)
    assert "condition/0" in other.diagnostics()


def documented(function: Any) -> set[str]:
    """The keys that a docstring lists: those before the colon of every item."""
    items = re.findall(r"^ *- (``.*?``): ", inspect.getdoc(function), re.MULTILINE)
    return set(itertools.chain.from_iterable(re.findall(r"``(.*?)``", item) for item in items))


def test_every_key_is_documented_and_every_documented_key_is_told() -> None:
    optimizer = natgrad.KFAC(network(), "mse")
    train(optimizer, 0, 1)
    ours, inner = optimizer.diagnostics(), optimizer.preconditioner.diagnostics()
    assert all(type(value) is float for value in ours.values())
    assert {key.split("/")[-1] for key in ours if "/" in key} == set(LAYERS)
    kfac, preconditioner = documented(natgrad.KFAC.diagnostics), documented(natgrad.Preconditioner.diagnostics)
    preconditioner -= {"traffic"}  # of several ranks
    assert {re.sub("/.*", "/<layer>", key) for key in inner} == preconditioner
    assert {re.sub("/.*", "/<layer>", key) for key in ours} == preconditioner | kfac
    assert not preconditioner & kfac
