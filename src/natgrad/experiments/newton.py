"""``natgrad newton``: the article's derivation, checked by numbers on a random deep linear network.

For the loss J = ½‖f − y‖², averaged over N data, and a layer z = [W b] x somewhere in a deep linear network (x with a 1
appended, B = (∂f/∂z)ᵀ the product of the later weights), the derivation in ``docs/derivation.md`` claims:

1. the Hessian of J in that layer is G ⊗ A with A = mean of x xᵀ and G = B Bᵀ, which is K-FAC's block;
2. hence the K-FAC step is Newton's step, and J being quadratic in one layer, it ends at that layer's minimum;
3. propagating a padded identity back as the output's error gives B Bᵀ exactly (``fisher="exact"``);
4. Gaussian errors (``fisher="mc"``) give it in expectation. With M = B Bᵀ and s errors, the relative error has the
   root mean square √(((tr M)² + ‖M‖²) / s) / ‖M‖: the fourth moments of a Gaussian vector.

K-FAC's side goes through :class:`natgrad.Preconditioner`, as in training; the other side is automatic differentiation
and dense algebra.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import natgrad
from natgrad.batch import Fisher
from natgrad.experiments.runfolder import write_atomically
from natgrad.experiments.table import Sheet
from natgrad.likelihoods import Gaussian

PLOT = "gaussian-errors.png"
DATA_PER_WIDTH = 10
SAMPLES = (10, 30, 100, 300, 1_000, 3_000, 10_000)
REPETITIONS = 20  # of every number of samples; their root mean square is shown
# What "equal" means: rounding, in the columns about steps amplified by the condition of the factors.
SAME_MATRIX, SAME_STEP = 1e-12, 1e-6
SAME_RATE = 0.1
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LayerCheck:
    """What was found at one layer: relative errors.

    Attributes:
        name: The layer's name in the network.
        hessian: K-FAC's block against the Hessian.
        identity: K-FAC's block, which propagates the identity's columns, against B Bᵀ ⊗ mean of x xᵀ.
        step: The K-FAC step against Newton's.
        gradient: The layer's gradient after the K-FAC step, over that before.
    """

    name: str
    hessian: float
    identity: float
    step: float
    gradient: float

    @property
    def holds(self) -> bool:
        """Whether claims 1 to 3 are true up to rounding."""
        matrices, steps = (self.hessian, self.identity), (self.step, self.gradient)
        return all(error < SAME_MATRIX for error in matrices) and all(error < SAME_STEP for error in steps)


@dataclass(frozen=True)
class Convergence:
    """G from Gaussian errors on the way to B Bᵀ.

    Attributes:
        samples: Numbers of errors s.
        errors: Root mean square of the relative error, for each s.
        theory: What that should be.
    """

    samples: tuple[int, ...]
    errors: tuple[float, ...]
    theory: tuple[float, ...]

    @property
    def slope(self) -> float:
        """Of log error over log s, by least squares."""
        x, y = torch.tensor(self.samples).log(), torch.tensor(self.errors).log()
        x = x - x.mean()
        return float((x * y).sum() / x.square().sum())


def newton(depth: int, width: int, seed: int, out: Path, console: Console) -> int:
    """Check all four claims, print what was found, and draw the convergence.

    Args:
        depth: Number of layers.
        width: Size of every layer, of the input and of the output.
        seed: Of weights, data and Gaussian errors.
        out: Folder for the plot.
        console: Where the tables go.

    Returns:
        The exit code: 0 when all claims hold, 1 otherwise.
    """
    # Imported here: matplotlib takes half a second, which `natgrad --help` need not wait for.
    from natgrad.experiments.newton_plot import draw

    model = network(depth, width, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x, y = torch.randn(2, DATA_PER_WIDTH * width, width, generator=generator, dtype=torch.float64)
    checks = check_layers(model, x, y)
    rate = convergence(model, seed, SAMPLES)
    layer_sheet(checks).show(console)
    convergence_sheet(rate).show(console)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / PLOT, lambda path: draw(rate, path))
    console.print(f"Written: {out / PLOT}", highlight=False)
    if all(check.holds for check in checks) and abs(rate.slope + 0.5) < SAME_RATE:
        console.print("All four claims hold.")
        return 0
    console.print("[red]Not all claims hold: natgrad is broken, or the factors are too close to singular.")
    return 1


def network(depth: int, width: int, seed: int) -> nn.Sequential:
    """A deep linear network of square layers not far from the identity, so that no factor is close to singular."""
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(width, width, dtype=torch.float64) for _ in range(depth)]
    for layer in layers:
        noise = torch.randn(width, width + 1, generator=generator, dtype=torch.float64) / (2 * width**0.5)
        layer.weight.data = torch.eye(width, dtype=torch.float64) + noise[:, :-1]
        layer.bias.data = noise[:, -1].clone()
    return nn.Sequential(*layers)


def check_layers(model: nn.Sequential, x: Tensor, y: Tensor) -> list[LayerCheck]:
    """Claims 1 to 3 at every layer, for the data x, (N, in), and y, (N, out)."""
    factors, steps = kfac(model, x, y, "exact", damping=0.0)
    return [_check_layer(model, name, x, y, factors[name], steps[name]) for name in factors]


def _check_layer(
    model: nn.Sequential, name: str, x: Tensor, y: Tensor, factors: Factors, kfac_step: Tensor
) -> LayerCheck:
    P, loss = _loss_of_matrix(model, name, x, y)
    # Reverse over reverse: `torch.func.hessian` goes forward and warns of torch's own use of a deprecated function.
    hessian = jacrev(jacrev(loss), chunk_size=128)(P).reshape(P.numel(), P.numel())
    gradient = jacrev(loss)(P)
    newton_step = torch.linalg.solve(hessian, gradient.flatten()).reshape_as(P)
    A, G = factors
    inputs, M = _inputs(model, name, x), _backprop_moment(model, name)
    return LayerCheck(
        name,
        hessian=_error(torch.kron(G, A), hessian),
        identity=_error(torch.kron(G, A), torch.kron(M, inputs.T @ inputs / len(x))),
        step=_error(kfac_step, newton_step),
        gradient=float(jacrev(loss)(P - kfac_step).norm() / gradient.norm()),
    )


def kfac(
    model: nn.Sequential, x: Tensor, y: Tensor, fisher: Fisher, damping: float, seed: int = 0
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Factors (A, G) and the natural gradient of [W b], by layer name, from the product."""
    model = deepcopy(model)
    preconditioner = natgrad.Preconditioner(
        model, Gaussian("batchmean"), fisher=fisher, damping=damping, factor_decay=0.0, batch_fraction=1.0, seed=seed
    )
    torch.autograd.backward(_loss(model(x), y))
    preconditioner.step()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    factors = preconditioner.factors()
    return factors, {n: torch.cat([grads[f"{n}.weight"], grads[f"{n}.bias"][:, None]], 1) for n in factors}


def convergence(model: nn.Sequential, seed: int, samples: Sequence[int]) -> Convergence:
    """Claim 4 at the first layer: one Gaussian error for each datum, as many data as there are samples."""
    generator = torch.Generator().manual_seed(seed + 2)
    M = _backprop_moment(model, "0")
    errors = []
    for s in samples:
        squares = 0.0
        for noise_seed in torch.randint(2**31, (REPETITIONS,), generator=generator).tolist():
            x = torch.randn(s, M.shape[0], generator=generator, dtype=torch.float64)
            factors, _ = kfac(model, x, x, "mc", damping=1.0, seed=noise_seed)
            squares += _error(factors["0"][1], M) ** 2
        errors.append((squares / REPETITIONS) ** 0.5)
    one_sample = float((M.trace() ** 2 + M.square().sum()).sqrt() / M.norm())
    return Convergence(tuple(samples), tuple(errors), tuple(one_sample / s**0.5 for s in samples))


def layer_sheet(checks: Sequence[LayerCheck]) -> Sheet:
    """Claims 1 to 3 as a table."""
    header = ("layer", "block − Hessian", "block − BBᵀ ⊗ XXᵀ/N", "step − Newton's", "gradient left")
    notes = [
        "Relative errors of K-FAC as natgrad computes it, without damping. Its block is the Hessian; hence its step is "
        "Newton's, and leaves the layer at its minimum.",
        "BBᵀ comes from a padded identity as the output's error: each of its columns is propagated back once, which is "
        'what `fisher="exact"` does for a Gaussian likelihood.',
    ]
    lines: list[tuple[str, ...] | None] = [
        (c.name, f"{c.hessian:.1e}", f"{c.identity:.1e}", f"{c.step:.1e}", f"{c.gradient:.1e}") for c in checks
    ]
    return Sheet("A deep linear network: the K-FAC step is Newton's step", header, lines, notes)


def convergence_sheet(rate: Convergence) -> Sheet:
    """Claim 4 as a table."""
    rows = zip(rate.samples, rate.errors, rate.theory, strict=True)
    return Sheet(
        "Gaussian errors on the way to BBᵀ",
        ("samples", "relative error", "theory"),
        [(f"{s:,}", f"{error:.2e}", f"{theory:.2e}") for s, error, theory in rows],
        [
            f"First layer; each error is the root mean square of {REPETITIONS} repetitions. "
            f"Fitted slope {rate.slope:.3f}, theory -0.5."
        ],
        text_columns=0,
    )


def _loss(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().sum() / 2 / len(y)


def _loss_of_matrix(model: nn.Sequential, name: str, x: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """One layer's [W b], and the loss as a function of it."""
    others = {key: parameter.detach() for key, parameter in model.named_parameters()}
    P = torch.cat([others[f"{name}.weight"], others[f"{name}.bias"][:, None]], 1)

    def loss(P: Tensor) -> Tensor:
        return _loss(functional_call(model, others | {f"{name}.weight": P[:, :-1], f"{name}.bias": P[:, -1]}, x), y)

    return P, loss


def _inputs(model: nn.Sequential, name: str, x: Tensor) -> Tensor:
    """The layer's inputs with a 1 appended: (N, in + 1)."""
    below = model[: int(name)](x).detach()
    return torch.cat([below, torch.ones_like(below[:, :1])], 1)


def _backprop_moment(model: nn.Sequential, name: str) -> Tensor:
    """B Bᵀ with B = W_{l+1}ᵀ ⋯ W_Lᵀ, which takes an error at the output back to the layer's output."""
    weights = [model.get_parameter(f"{layer}.weight").detach() for layer in range(len(model))]
    B = torch.eye(len(weights[-1]), dtype=weights[-1].dtype)
    for W in reversed(weights[int(name) + 1 :]):
        B = W.T @ B
    return B @ B.T


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
