"""Networks that differentiate themselves: the rows of every use of a weight, against autograd and a closed form."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils.parametrizations import weight_norm

import natgrad
from natgrad import forward
from natgrad.batch import Fisher
from natgrad.layers import DerivativeUse, Sharing, partition
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")
DATA = 7


def gradient(f: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(f.sum(), x, create_graph=True)[0]


class Twice(nn.Module):
    """What ``inner`` makes of x is differentiated so many times, along with its own value."""

    def __init__(self, inner: nn.Module, times: int) -> None:
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        f = self.inner(x)
        outputs = [f.flatten(1)]
        for _ in range(self.times):
            f = gradient(f.square(), x) + 0.5 * gradient(f, x)
            outputs.append(f.flatten(1))
        return torch.cat(outputs, 1)


class Residual(nn.Module):
    """The input of the second layer goes further, too, and the gradient of a sum is one tensor for both terms."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x).tanh()
        return self.three(h + (self.two(h) + self.two(h.cos())).sin())


class Kernels(nn.Module):
    """Convolutions with a stride, padding and groups, and a transposed one; in-place activations between them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.SiLU(inplace=True),
            nn.Conv2d(4, 4, 3, stride=2, groups=2),
            nn.Softplus(),
            nn.ConvTranspose2d(4, 2, 2, stride=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.reshape(-1, 1, 5, 5))


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def normalized() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def at_positions() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (5, 3)), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "value alone": (dense, 3, 0),
    "first derivatives": (dense, 3, 1),
    "second derivatives": (dense, 3, 2),
    "third derivatives": (dense, 3, 3),
    "a residual": (Residual, 3, 2),
    "kernels": (Kernels, 25, 1),
    "kernels twice": (Kernels, 25, 2),
    "a normalized weight": (normalized, 3, 2),
    "positions": (at_positions, 15, 2),
}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    kind, width, times = MODELS[name]
    model = Twice(kind(), times)
    x = torch.randn(DATA, width)
    return model, x, torch.randn_like(model(x))


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_all_uses_make_up_the_gradient(name: str) -> None:
    """Catches a use that was missed, counted twice, not transposed, or given the bias of another."""
    model, x, y = made(name)
    optimizer = natgrad.KFAC(model, "mse")
    mse_loss(model(x), y).backward()
    samples = optimizer.preconditioner.capture.ahead[-1].samples
    for layer in partition(model).layers:
        (sample,) = samples[layer.name]
        rows, gradients = sample.rows()
        if rows.shape[-1] < layer.shape[1]:
            rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
        total = (gradients.mT @ rows).sum(-3)
        expected = layer.to_matrix([p.grad for p in layer.parameters])
        assert relative_error(total, expected) < 1e-10, layer.name


@pytest.mark.parametrize("name", [name for name in MODELS if name != "a normalized weight"])
def test_corrected_eigenvalues_are_those_of_the_exact_block(name: str) -> None:
    """EKFAC's are the diagonal of the exact Gauss-Newton block in its basis: all uses of a datum and their products."""
    model, x, y = made(name)
    blocks = natgrad.curvature(model, x, y, "mse", fisher="exact", ekfac=True)
    f = model(x).flatten()
    for layer in partition(model).layers:
        rows = []
        for entry in f:
            gradients = torch.autograd.grad(entry, layer.parameters, retain_graph=True, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, layer.parameters, strict=True)]
            rows.append(layer.to_matrix(filled))
        J = torch.stack(rows)
        Q_A, Q_G = blocks[layer.name].bases
        exact = 2 / len(f) * (Q_G.mT @ J @ Q_A).square().sum(0)
        assert relative_error(blocks[layer.name].spectrum, exact) < 1e-8, layer.name


class Slope(nn.Module):
    """∇ₓ of vᵀ tanh(W x + b)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return gradient(self.outer(self.inner(x).tanh()), x)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_factors_in_closed_form(fisher: Fisher, sharing: Sharing) -> None:
    """Rows of a use of Wᵀ enter A with what the loss says of it, and G with what the pass brought.

    The outer layer's own output has no gradient but in the network's own pass, which must not be taken for the user's.
    """
    torch.manual_seed(0)
    model, x, y = Slope(), torch.randn(DATA, 3), torch.randn(DATA, 3)
    blocks = natgrad.curvature(model, x, y, "mse", fisher=fisher, sharing=sharing)
    block, outer = blocks["inner"], blocks["outer"]
    W, v = model.inner.weight.detach(), model.outer.weight.detach()
    t = model.inner(x).tanh().detach()
    z_bar = v * (1 - t**2)
    residual = (model(x) - y).detach()
    R = 2 / (3 * DATA)
    vectors = list(torch.eye(3).expand(DATA, 3, 3).unbind(1)) if fisher == "exact" else [residual]
    at_z = [-2 * t * z_bar * (s @ W.mT) for s in vectors]
    one = torch.cat([x, torch.ones(DATA, 1)], 1)
    A, G = one.mT @ one / DATA, R * sum(g.mT @ g for g in at_z)
    A_other, G_other = R * sum(s.mT @ s for s in vectors), z_bar.mT @ z_bar / DATA
    padded = nn.functional.pad(A_other, (0, 1, 0, 1))
    traced = G.trace() * A + G_other.trace() * padded, A.trace() * G + padded.trace() * G_other
    expected = torch.kron(traced[1], traced[0]) / (A.trace() * G.trace() + padded.trace() * G_other.trace())
    assert relative_error(torch.kron(block.G, block.A), expected) < 1e-10
    at_x = [(1 - t**2) * (s @ W.mT) for s in vectors]
    only = R * sum(s.mT @ s for s in at_x)
    assert relative_error(outer.G * outer.A, nn.functional.pad(only, (0, 1, 0, 1))) < 1e-10


def test_both_directions_share_two_sums() -> None:
    """With second derivatives W is used five times: as W in the sums of z = W x, as Wᵀ in one other."""
    model, x, y = made("second derivatives")
    optimizer = natgrad.KFAC(model, "mse")
    mse_loss(model(x), y).backward()
    batch = optimizer.preconditioner.capture.ahead[-1]
    assert set(batch.statistics) == {(layer.name, swapped) for layer in partition(model).layers for swapped in (0, 1)}
    layers = {type(layer) for layer in batch.samples["inner.2"][0].layers}
    assert DerivativeUse in layers


def test_some_of_the_data_alone() -> None:
    """The pass of the data that enter the factors is recognized, with all uses, and gives what the whole pass gives."""
    torch.manual_seed(0)
    model = Twice(dense(), 2)
    x = torch.randn(4000, 3)
    y = torch.randn_like(model(x))
    optimizer = natgrad.KFAC(model, "mse")
    capture = optimizer.preconditioner.capture
    mse_loss(model(x), y).backward()
    assert capture._has_parts
    alone = capture.take().statistics
    capture._has_parts = False
    optimizer.zero_grad()
    mse_loss(model(x), y).backward()
    whole = capture.take().statistics
    for key, sums in whole.items():
        assert alone[key].rows == sums.rows
        assert relative_error(alone[key].A / alone[key].weight, sums.A / sums.weight) < 1e-10


class Mark:
    """Kept by a node of the graph alone."""

    def keep(self, *_: object) -> None:
        pass


def test_nothing_stays_behind() -> None:
    """Hooks on the user's own leaf go with the pass, and graphs go with their outputs."""
    torch.manual_seed(0)
    model, x = Slope(), torch.randn(DATA, 3, requires_grad=True)
    optimizer = natgrad.KFAC(model, "mse")
    gc.disable()
    try:
        for _ in range(3):
            marks = [Mark()]
            output = model(x)
            output.grad_fn.register_hook(marks[0].keep)
            mse_loss(output, torch.zeros(DATA, 3)).backward()
            optimizer.step()
            seen = weakref.ref(marks.pop())
            del output
            assert seen() is None
    finally:
        gc.enable()
    assert not x._backward_hooks


def test_a_pass_that_fails_leaves_nothing_to_the_next() -> None:
    model, x, y = made("second derivatives")
    optimizer = natgrad.KFAC(model, "mse")
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(DATA, 5))
    mse_loss(model(x), y).backward()
    (sample,) = optimizer.preconditioner.capture.ahead[-1].samples["inner.0"]
    assert len(sample.layers) == len([layer for layer in sample.layers if layer.of_derivative]) + 1


class Poisson(nn.Module):
    """u″ + π² sin πx inside, and u at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))

    def forward(self, x: Tensor, ends: Tensor) -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        curvature = gradient(gradient(self.u(x), x), x)
        return {"inside": curvature + torch.pi**2 * (torch.pi * x).sin(), "ends": self.u(ends)}


def test_a_differential_equation() -> None:
    """Without rows of derivatives the loss is a hundred times larger after these steps."""
    torch.manual_seed(0)
    model, x, ends = Poisson(), torch.linspace(0, 1, 100)[:, None], torch.arange(2.0)[:, None]
    optimizer = natgrad.KFAC(model, loss={"inside": "mse", "ends": (10.0, "mse")})
    for _ in range(60):
        optimizer.zero_grad()
        outputs = model(x, ends)
        loss = outputs["inside"].square().mean() + 10 * outputs["ends"].square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
    assert (model.u(x) - (torch.pi * x).sin()).abs().max() < 0.01


def test_derivatives_in_the_loop_are_told_of() -> None:
    """A residual that is made of the output, outside of the model: what its loss is natgrad cannot know."""
    torch.manual_seed(0)
    model, x = dense(), torch.randn(DATA, 3, requires_grad=True)
    optimizer = natgrad.KFAC(model, "mse")
    forward._tell_of_derivatives.cache_clear()  # once is enough, of all optimizers
    with pytest.warns(RuntimeWarning, match="the training loop differentiates the model's output"):
        residual = gradient(model(x), x)
    residual.square().mean().backward()
    optimizer.step()


def of_one(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x)[0]


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "vmap": lambda model, x: torch.func.vmap(model)(x),
    "hessian": lambda model, x: torch.func.vmap(torch.func.hessian(of_one(model)))(x),
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).sum())(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_in_which_data_cannot_be_seen_are_refused(transform: str) -> None:
    """Without a word some of them would train on nothing."""

    class Transformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return TRANSFORMS[transform](self.inner, x)

    model = Transformed()
    optimizer = natgrad.KFAC(model, "mse")
    with pytest.raises(RuntimeError, match=r"'inner.0' was called inside a transform of torch\.func"):
        model(torch.randn(5, 3))
    with torch.no_grad():
        model(torch.randn(5, 3))
    del optimizer


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_the_whole_model_may_be_transformed() -> None:
    """As for gradients of single data, while an optimizer is there: these passes are not trained on."""
    torch.manual_seed(0)
    model, x = dense(), torch.randn(DATA, 3)
    optimizer = natgrad.KFAC(model, "mse")
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    model(x).square().mean().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(each[name].mean(0), p.grad)
    assert optimizer.preconditioner.capture.ahead[-1].forwards == 1
    optimizer.step()
