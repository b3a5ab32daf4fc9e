"""Stage 7, second half: the exact quadratic model of the loss along a few directions.

Along directions V = [d₁ d₂ …] the loss is modelled as L(θ + Vc) ≈ L + bᵀc + ½ cᵀMc with b = Vᵀg and M = VᵀFV, where F
is the Gauss-Newton matrix of the *whole* network, not its Kronecker approximation:

    M_ij = R Σ_n (J_n d_i)ᵀ ∇²c (J_n d_j)

so two Jacobian-vector products by forward-mode differentiation, on some of the batch, are all it takes; nothing is
backpropagated. Minimizing over c gives rate and momentum at once: d₁ is the natural gradient, d₂ the previous step.

Source: Martens and Grosse (2015), arXiv:1503.05671, sections 6.4 and 7.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from natgrad.capture import ForwardInputs
from natgrad.factors import at_least_float32
from natgrad.likelihoods import Likelihood

# Data on which the model is evaluated. The relative error of M falls as its inverse square root; at 1,024 it is
# near 2 %.
MAX_DATA = 1024


def curvature_matrix(
    model: nn.Module,
    likelihood: Likelihood,
    inputs: ForwardInputs,
    terms: float,
    directions: Sequence[dict[str, Tensor]],
    select: Callable[[Any], Tensor],
    max_data: int = MAX_DATA,
) -> Tensor:
    """M, of shape (k, k) in float64, for k directions given by parameter name.

    Args:
        model: The module; it is evaluated once per direction, and its buffers do not change.
        likelihood: Of the loss.
        inputs: Arguments of a forward pass.
        terms: What the reduction divides by, over the whole batch; more than that forward's when the batch was split.
        directions: Tensors shaped like the parameters named; others do not move.
        select: From the model's return value to the tensor that the loss sees.
        max_data: Of a larger batch, about this many data, evenly spread, stand for all.
    """
    args, kwargs = subsample(inputs, max_data)
    parameters = {name: model.get_parameter(name).detach() for name in directions[0]}

    def output(moving: dict[str, Tensor]) -> Tensor:
        # Copies made in here may be written to under differentiation; captured ones may not.
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return select(functional_call(model, {**moving, **buffers}, args, kwargs))

    at, products = torch.empty(0), []
    for direction in directions:
        tangent = {name: direction[name].to(parameter.dtype) for name, parameter in parameters.items()}
        # The same dropout for every direction, and the user's random stream as it was.
        with torch.random.fork_rng(devices=_devices(parameters)), warnings.catch_warnings():
            # torch 2.13 warns of its own use of it, at the first call.
            warnings.filterwarnings("ignore", message="`torch.jit.script`", category=DeprecationWarning)
            at, product = torch.func.jvp(output, (parameters,), (tangent,))
        products.append(at_least_float32(product))
    at = at_least_float32(at)
    J = torch.stack([product.flatten() for product in products])
    HJ = torch.stack([likelihood.hessian_product(at, product).flatten() for product in products])
    return likelihood.scale(terms) * (terms / likelihood.terms(at)) * (J @ HJ.mT).double()


def _devices(parameters: dict[str, Tensor]) -> list[torch.device]:
    return list({parameter.device for parameter in parameters.values() if parameter.device.type == "cuda"})


def subsample(inputs: ForwardInputs, max_data: int) -> ForwardInputs:
    """Every k-th datum of each tensor that has the batch as its first dimension.

    The batch is taken to be the first dimension of the first tensor argument.
    """
    args, kwargs = inputs
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 0]
    n = tensors[0].shape[0] if tensors else 0
    every = n // max_data
    if every < 2:
        return inputs

    def take(value: Any) -> Any:
        return value[::every] if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == n else value

    return tuple(map(take, args)), {key: take(value) for key, value in kwargs.items()}


def minimize(M: Tensor, b: Tensor, fixed: Sequence[float | None]) -> Tensor:
    """The c that minimizes bᵀc + ½ cᵀMc, with some of its entries given.

    Args:
        M: (k, k), positive semi-definite up to rounding.
        b: (k,).
        fixed: Given entries of c; None where it is free.

    Returns:
        c, (k,). Directions in which the model has no curvature are not moved along.
    """
    c = torch.tensor([value or 0.0 for value in fixed], dtype=M.dtype)
    free = [i for i, value in enumerate(fixed) if value is None]
    if free:
        M_free, rest = M[free][:, free], b[free] + M[free] @ c
        # Scaled to a unit diagonal, so that a tiny previous step is not mistaken for a null direction.
        size = M_free.diagonal().clamp(min=0).sqrt()
        unit = torch.where(size > 0, 1 / size, 0.0)
        correlation = M_free * torch.outer(unit, unit)
        c[free] = -unit * (torch.linalg.pinv(correlation, rtol=1e-10, hermitian=True) @ (unit * rest))
    return c
