"""EKFAC in the preconditioner: eigenvalues against the diagonal of dense blocks from the oracle, in the same basis."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import natgrad
from cases import LOSSES, MSE, TOLERANCE, data_for
from layer_cases import NOT_EXACT, norm
from layer_modules import Language
from linear_cases import stack
from natgrad.layers import Layer, base, spectrum
from oracle import LossFn, empirical_fisher_block, ggn_block, layer_params, relative_error
from transcribed import counterparts, write_out

pytestmark = pytest.mark.usefixtures("float64")
every_damping = pytest.mark.parametrize("damp", ["auto", 0.1, (0.2, 0.3)], ids=str)
PROBLEMS = NOT_EXACT | {
    "linear": lambda bias: (stack([3, 4, 5, 3], bias=bias), torch.randn(6, 3)),
    "layer norm": norm(lambda: nn.LayerNorm(4), 5, 3, 4).make,
    "batch norm": norm(lambda: nn.BatchNorm2d(3).eval(), 4, 3, 2, 2).make,
}


class Held:
    """A preconditioner whose model does not move: bases from a first batch, eigenvalues from those that follow."""

    def __init__(self, model: nn.Module, told: Any, loss_fn: LossFn, **options: Any) -> None:
        self.model, self.loss_fn = copy.deepcopy(model), loss_fn
        defaults = {"factor_decay": 0.0, "batch_fraction": 1.0, "damping": 1.0, "inverse_period": 100}
        self.preconditioner = natgrad.Preconditioner(self.model, told, inverse="ekfac", **defaults | options)

    def step(self, *batches: tuple[Tensor, Tensor]) -> None:
        """Micro-batches of one batch, whose loss is a mean over data."""
        self.model.zero_grad()
        total = sum(len(x) for x, _ in batches)
        for x, y in batches:
            (self.loss_fn(self.model(x), y) * len(x) / total).backward()
        assert self.preconditioner.step()

    def state(self, name: str) -> dict[str, Tensor]:
        return self.preconditioner.state_dict()["layers"][name]

    def spectrum(self, name: str) -> Tensor:
        return self.state(name)["spectrum"]

    @property
    def layers(self) -> list[Layer]:
        return self.preconditioner.layers

    def basis(self, name: str) -> Tensor:
        """Q = Q_G ⊗ Q_A, (B, P, P), B = 1 without blocks."""
        Q_A, Q_G = (self.state(name)[key] for key in ("A_basis", "G_basis"))
        dense = [(Q if Q.shape[-1] == Q.shape[-2] else Q.squeeze(-1).diag_embed()).contiguous() for Q in (Q_G, Q_A)]
        pairs = zip(*(Q.reshape(-1, *Q.shape[-2:]) for Q in dense), strict=True)
        return torch.stack([torch.kron(*pair) for pair in pairs])

    def diagonal(self, name: str, block: Tensor) -> Tensor:
        """Of a dense block, ([B,] P, P), in the stored bases, shaped like the spectrum."""
        Q = self.basis(name)
        return torch.einsum("bij,bik,bkj->bj", Q, block.reshape_as(Q), Q).reshape(self.spectrum(name).shape)


def kronecker(held: Held, name: str) -> Tensor:
    """The Kronecker eigenvalues of the running factors."""
    A, G = held.preconditioner.factors()[name]
    a, g = (F.squeeze(-1) if F.shape[-1] == 1 else torch.linalg.eigvalsh(F) for F in (A, G))
    return g.unsqueeze(-1) * a.unsqueeze(-2)


# The eigenvalues.


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("loss_name", ["mse", "ce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_eigenvalues_are_the_diagonal_of_the_exact_block(name: str, fisher: Any, loss_name: str, bias: bool) -> None:
    """In any basis, here that of other data; with positions, calls, groups, tokens and norms, where K-FAC is wrong."""
    torch.manual_seed(0)
    model, x = PROBLEMS[name](bias)
    loss = LOSSES[loss_name]
    model(x)  # lazy layers
    other = torch.randint_like(x, 7) if not x.is_floating_point() else torch.randn_like(x)
    held, batch = Held(model, loss.told, loss.loss_fn, fisher=fisher), data_for(model, loss, x)
    held.step(data_for(model, loss, other))
    bases = {layer.name: held.state(layer.name)["G_basis"].clone() for layer in held.layers}
    held.step(batch)
    plain, moved = write_out(model), 0
    for ours, theirs in counterparts(plain).items():
        if ours not in bases:
            continue  # the other name of a tied layer
        blocks = [exact_block(plain, n, batch, loss, fisher) for n in theirs]
        expected = held.diagonal(ours, torch.stack(blocks) if len(blocks) > 1 else blocks[0])
        assert torch.equal(held.state(ours)["G_basis"], bases[ours])
        assert relative_error(held.spectrum(ours), expected) < TOLERANCE, ours
        moved += relative_error(kronecker(held, ours), expected) > 0.01
    assert moved


def exact_block(model: nn.Module, layer: str, batch: tuple[Tensor, Tensor], loss: Any, fisher: str) -> Tensor:
    params = layer_params(model, layer)
    if fisher == "exact":
        return ggn_block(model, params, *batch, loss.loss_fn)
    return empirical_fisher_block(model, params, *batch, loss.criterion, loss.scale(model(batch[0]), batch[1]))


@pytest.mark.parametrize("name", ["linear", "linear, positions", "conv2d", "grouped"])
@pytest.mark.parametrize("samples", [1, 3])
def test_sampled_eigenvalues_are_those_of_the_sampled_gradients(
    name: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vectors are noted as they are drawn; a datum's gradient is that of its output times its vector."""
    torch.manual_seed(0)
    drawn: list[Tensor] = []
    sample = natgrad.likelihoods.Categorical.sample
    monkeypatch.setattr(
        natgrad.likelihoods.Categorical, "sample", lambda *args: drawn.append(sample(*args)) or drawn[-1]
    )
    model, x = PROBLEMS[name](True)
    held, loss = Held(model, "cross_entropy", cross_entropy, mc_samples=samples), LOSSES["ce"]
    held.step(data_for(model, loss, torch.randn_like(x)))
    drawn.clear()
    held.step(data_for(model, loss, x))
    assert len(drawn) == samples
    R = 1 / drawn[0][:, 0].numel()
    for layer in held.layers:
        params = layer_params(model, layer.name)
        blocks = [empirical_fisher_block(model, params, x, v, lambda f, v: (f * v).flatten(1).sum(1), R) for v in drawn]
        expected = held.diagonal(layer.name, sum(blocks) / samples)
        assert relative_error(held.spectrum(layer.name), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped", "embedding", "attention"])
def test_gradients_are_built_a_few_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spectra = []
    for chunk in (1, 100, 2**24):
        monkeypatch.setattr(spectrum, "CHUNK", chunk)
        torch.manual_seed(0)
        model, x = PROBLEMS[name](True)
        held = Held(model, "cross_entropy", cross_entropy)
        for _ in range(2):
            held.step(data_for(model, LOSSES["ce"], x))
        spectra.append({layer.name: held.spectrum(layer.name) for layer in held.layers})
    for layer, expected in spectra[-1].items():
        assert all(relative_error(some[layer], expected) < 1e-12 for some in spectra)


@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped"])
def test_a_diagonal_factor_has_the_identity_for_its_basis(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_DENSE", 3)
    torch.manual_seed(0)
    model, x = PROBLEMS[name](True)
    held, batch = Held(model, "mse", mse_loss, fisher="exact"), data_for(model, MSE, x)
    held.step(data_for(model, MSE, torch.randn_like(x)))
    held.step(batch)
    assert {layer.diagonal for layer in held.layers} >= {(False, True)}
    for layer in held.layers:
        expected = held.diagonal(layer.name, ggn_block(model, layer_params(model, layer.name), *batch, mse_loss))
        assert relative_error(held.spectrum(layer.name), expected) < TOLERANCE


# Which data they are of.


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("name", ["linear", "linear, positions", "linear, repeated", "grouped", "embedding"])
def test_micro_batches_have_the_eigenvalues_of_the_batch(name: str, fisher: Any) -> None:
    torch.manual_seed(0)
    model, x = PROBLEMS[name](True)
    x, y = data_for(model, LOSSES["ce"], x)
    whole, split = (Held(model, "cross_entropy", cross_entropy, fisher=fisher) for _ in range(2))
    for held in (whole, split):
        held.step((x, y))
    whole.step((x, y))
    split.step((x[:1], y[:1]), (x[1:], y[1:]))
    for layer in whole.layers:
        assert relative_error(split.spectrum(layer.name), whole.spectrum(layer.name)) < 1e-12


def test_a_fraction_of_the_data_stands_for_all() -> None:
    """All data alike, so that any half is the whole."""
    model, x = stack([3, 4, 3]), torch.randn(1, 3).repeat(8, 1)
    batch, spectra = data_for(model, MSE, x), []
    for fraction in (1.0, 0.5):
        held = Held(model, "mse", mse_loss, fisher="exact", batch_fraction=fraction)
        for _ in range(2):
            held.step(batch)
        spectra.append({layer.name: held.spectrum(layer.name) for layer in held.layers})
    for name, expected in spectra[0].items():
        assert relative_error(spectra[1][name], expected) < 1e-12


def test_calls_with_different_data_count_separately() -> None:
    """A layer called on the batch and on a part of it: what has no datum in common is not added up."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(x[:2].tanh()).sum()

    torch.manual_seed(0)
    held, x, y = Held(Partly(), "mse", mse_loss, fisher="empirical"), torch.randn(5, 3), torch.randn(5, 3)
    for _ in range(2):
        held.step((x, y))
    g = held.model(x).detach() - y  # of the criterion, a half of the squared error
    calls = [(x, g), (x[:2].tanh(), g.sum().expand(2, 3))]
    V = torch.cat([torch.einsum("no,ni->noi", g, nn.functional.pad(x, (0, 1), value=1.0)) for x, g in calls]).flatten(1)
    assert relative_error(held.spectrum("layer"), held.diagonal("layer", 2 / 15 * V.T @ V)) < TOLERANCE


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_between_bases_the_eigenvalues_are_averaged(decay: float) -> None:
    """Debiased as the factors are, from the Kronecker eigenvalues on, to which every new basis returns."""
    model, batches = stack([3, 4, 2]), [data_for(stack([3, 4, 2]), MSE, torch.randn(6, 3)) for _ in range(7)]
    held = Held(model, "mse", mse_loss, fisher="exact", factor_decay=decay, inverse_period=3)
    weights: list[float] = []
    values: list[Tensor] = []
    for i, batch in enumerate(batches):
        held.step(batch)
        if i % 3 == 0:
            weights, values = [1.0], [kronecker(held, "0")]
        else:
            block = ggn_block(model, layer_params(model, "0"), *batch, mse_loss)
            weights, values = [decay * w for w in weights] + [1.0], [*values, held.diagonal("0", block)]
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert relative_error(held.spectrum("0"), expected) < 1e-10


# What is solved.


@every_damping
def test_one_datum_is_the_eigen_inverse(damp: Any) -> None:
    """There the second moments are the Kronecker eigenvalues, and damping must not tell the two apart."""
    torch.manual_seed(0)
    model, x, y = stack([3, 4, 2]), torch.randn(1, 3), torch.randn(1, 2)
    gradients = []
    for inverse in ("eigen", "ekfac"):
        preconditioner = natgrad.Preconditioner(
            copy.deepcopy(model), "mse", inverse=inverse, fisher="exact", damping=damp, inverse_period=4
        )
        for _ in range(3):
            preconditioner.model.zero_grad()
            mse_loss(preconditioner.model(x), y).backward()
            preconditioner.step()
        gradients.append([p.grad for p in preconditioner.model.parameters()])
    for eigen, ekfac in zip(*gradients, strict=True):
        assert relative_error(ekfac, eigen) < 1e-10


@pytest.mark.parametrize("name", ["linear", "grouped", "embedding"])
def test_step_solves_with_the_dense_block(name: str) -> None:
    """Q diag(s) Qᵀ + δ I, with s of this very batch. Other dampings are tested with the inverse itself."""
    torch.manual_seed(0)
    model, x = PROBLEMS[name](True)
    held, (x, y) = Held(model, "cross_entropy", cross_entropy, damping=0.1), data_for(model, LOSSES["ce"], x)
    held.step((x, y))
    held.model.zero_grad()
    cross_entropy(held.model(x), y).backward()
    before = {layer.name: layer.to_matrix([p.grad.clone() for p in layer.parameters]) for layer in held.layers}
    held.preconditioner.step()
    for layer in held.layers:
        Q = held.basis(layer.name)
        block = Q @ held.spectrum(layer.name).reshape(len(Q), -1).diag_embed() @ Q.mT + 0.1 * torch.eye(Q.shape[-1])
        expected = torch.linalg.solve(block, before[layer.name].reshape(len(Q), -1, 1))
        natural = layer.to_matrix([p.grad for p in layer.parameters])
        assert relative_error(natural.flatten(), expected.flatten()) < TOLERANCE


# Where there is nothing to correct with.


def test_a_table_tied_to_a_head_keeps_the_kronecker_eigenvalues() -> None:
    """Its gradient is a sum of rows of either orientation. The others of the model do not."""
    torch.manual_seed(0)
    model, tokens = nn.Sequential(Language(), nn.Flatten(0, 1)), torch.randint(7, (3, 4))
    held = Held(model, "cross_entropy", cross_entropy, inverse_period=3)
    targets = torch.randint(7, (12,))
    spectra = []
    for _ in range(2):
        held.model.zero_grad()
        cross_entropy(held.model(tokens), targets).backward()
        held.preconditioner.step()
        spectra.append({name: held.spectrum(name).clone() for name in ("0.head", "0.body")})
    assert {n: torch.equal(spectra[0][n], spectra[1][n]) for n in spectra[0]} == {"0.head": True, "0.body": False}
    blocks = natgrad.curvature(model, tokens, targets, "cross_entropy", ekfac=True)
    assert {name: block.ekfac for name, block in blocks.items()} == {"0.head": False, "0.body": True}


def test_the_forward_fisher_has_no_gradients() -> None:
    with pytest.raises(ValueError, match=r'`inverse="ekfac"` needs gradients, and `fisher="forward"` has none'):
        natgrad.Preconditioner(stack([3, 2]), fisher="forward", inverse="ekfac")


def test_data_that_can_be_gone_through_once_are_refused() -> None:
    """The second pass would be empty, and K-FAC returned in the place of EKFAC."""
    model, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.randn(8, 2)
    pairs = list(zip(x.split(4), y.split(4), strict=True))
    with pytest.raises(ValueError, match="goes through `x` twice"):
        natgrad.curvature(model, iter(pairs), loss="mse", ekfac=True)
    assert natgrad.curvature(model, pairs, loss="mse", ekfac=True)[""].ekfac
