"""Beside stage 6: what the latest step did, as numbers; computed when somebody asks, from what is stored anyway.

What enters are, for each layer, its state (A, G, the inverse), what was added to the factors (:class:`Applied`) and its
step; what leaves are 0-d tensors and numbers by key, ``quantity`` for the model and ``quantity/layer`` for one layer.
With M the step of the layer's matrix [W b]:

    ½ tr(Mᵀ G M A)                           half the step's squared length in the layer's block, undamped
    κ(A + λ_A I) = (a_max + λ_A) · max eigenvalue of (A + λ_A I)⁻¹, of G likewise

The first is the KL divergence that the step causes, to second order, in units of the loss. Where explicit inverses are
stored, both largest eigenvalues come from power iterations, so κ is a lower bound (and of factors that have moved
since, if the inverse has an age); where eigenvalues are, κ is exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from natgrad import damping as dampings
from natgrad.damping import Damping
from natgrad.derivatives import length
from natgrad.distributed import whole
from natgrad.inverses import apply, reciprocal, to_basis
from natgrad.layers import Layer

# Products with a factor for its largest eigenvalue: enough for a few percent on the spectra of networks.
ITERATIONS = 20

Values = dict[str, Tensor | float]


@dataclass(frozen=True)
class Applied:
    """What was added to the factors of a layer when they were last inverted, and the number of that step."""

    damping: Damping
    step: int


def of_inverses(states: Mapping[str, Mapping[str, Tensor]], applied: Mapping[str, Applied], step: int) -> Values:
    """Age of the inverses, damping and condition numbers of each layer.

    Args:
        states: By name, of the layers to tell of: the factors and what their inverse stores.
        applied: By layer name.
        step: Number of the latest step.
    """
    values: Values = {}
    for name, one in ((name, applied[name]) for name in states if name in applied):
        own: Values = {"inverse_age": step - one.step}
        own |= {"damping_a": one.damping.a, "damping_g": one.damping.g, "damping": one.damping.product}
        own |= condition_numbers(states[name], one.damping)
        values |= {f"{key}/{shown(name)}": value for key, value in own.items()}
    return values


def summary(applied: Mapping[str, Applied], step: int) -> Values:
    """The age of the oldest inverse, and the means of the dampings over the layers."""
    if not applied:
        return {}
    ages = [step - one.step for one in applied.values()]
    return {"inverse_age": max(ages), **dampings.mean([one.damping for one in applied.values()])}


def condition_numbers(state: Mapping[str, Tensor], damping: Damping) -> Values:
    """κ of the damped block, and of both damped factors where it is their product; of the worst of several blocks.

    Directions that the inverse leaves out do not count.
    """
    if "A_basis" in state:
        kron = "scale" in state  # else EKFAC's eigenvalues
        scale = state["scale"] if kron else reciprocal(state["spectrum"] + state["shift"])
        curvature = torch.where(scale > 0, 1 / scale, 0.0)  # eigenvalues of the damped block
        values: Values = {"condition": _spread(curvature.flatten(-2))}
        if kron and damping.product == 0:
            values |= {"condition_a": _spread(curvature.amax(-2)), "condition_g": _spread(curvature.amax(-1))}
        return values
    a = (largest_eigenvalue(state["A"]) + damping.a) * largest_eigenvalue(state["A_inverse"])
    g = (largest_eigenvalue(state["G"]) + damping.g) * largest_eigenvalue(state["G_inverse"])
    return {"condition": (a * g).max(), "condition_a": a.max(), "condition_g": g.max()}


def largest_eigenvalue(factor: Tensor) -> Tensor:
    """Of a positive semi-definite factor, ([B,] d, d), from below; of a diagonal one, ([B,] d, 1), exactly. ([B])."""
    if factor.shape[-1] == 1:
        return factor.amax((-2, -1))
    # A generator of its own: asking for diagnostics must not change what the training draws.
    v = torch.randn(factor.shape[-1], 1, generator=torch.Generator().manual_seed(0)).to(factor)
    return dampings.power_iteration(factor, v, ITERATIONS)


def of_step(
    layers: Sequence[Layer], states: Mapping[str, Mapping[str, Tensor]], step: Mapping[nn.Parameter, Tensor]
) -> Values:
    """Length of the step and its KL divergence by the blocks, of each layer and of all."""
    values: Values = {}
    divergences = []
    for layer in layers:
        if any(p in step for p in layer.parameters):
            # A bias that no derivative depends on has no gradient, and stays.
            moved = {p: step[p] if p in step else torch.zeros_like(whole(p.detach())) for p in layer.parameters}
            own = norms(moved, layer.parameters)
            own["kl_kfac"] = half_square(states[layer.name], layer.step_to_matrix(list(moved.values())))
            values |= {f"{key}/{shown(layer.name)}": value for key, value in own.items()}
            divergences.append(float(own["kl_kfac"]))
    return {"kl_kfac": sum(divergences), **values} if values else {}


def norms(step: Mapping[nn.Parameter, Tensor], parameters: Sequence[nn.Parameter]) -> Values:
    """Length of a step, and the same over the length of the parameters that took it."""
    moved = length(step[p] for p in parameters)
    return {"step_norm": moved, "relative_step": moved / length(whole(p.detach()) for p in parameters)}


def half_square(state: Mapping[str, Tensor], M: Tensor) -> Tensor:
    """½ tr(Mᵀ G M A); with EKFAC's eigenvalues s, half the sum of s times the squares of M in the eigenbasis."""
    M = M.to(state["A"].dtype)
    if "spectrum" in state:
        return 0.5 * torch.sum(state["spectrum"] * to_basis((state["A_basis"], state["G_basis"]), M).square())
    return 0.5 * torch.sum(apply(state["G"], M) * apply(state["A"], M.mT).mT)


def numbers(values: Values) -> dict[str, float]:
    """As plain numbers: here the device is waited for."""
    return {key: float(value) for key, value in values.items()}


def shown(name: str) -> str:
    """A layer's name in a key; a model that is itself a layer has the empty name."""
    return name or "model"


def _spread(eigenvalues: Tensor) -> Tensor:
    """Largest over smallest of those that are not zero, ([B,] d), in the worst block."""
    least = torch.where(eigenvalues > 0, eigenvalues, torch.inf).amin(-1)
    return (eigenvalues.amax(-1) / least).max()
