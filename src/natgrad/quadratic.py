"""Stage 7, second half: the exact quadratic model of the loss along a few directions.

Along directions V = [d₁ d₂ …] the loss is modelled as L(θ + Vc) ≈ L + bᵀc + ½ cᵀMc with b = Vᵀg and M = VᵀFV, where F
is the Gauss-Newton matrix of the *whole* network, not its Kronecker approximation:

    M_ij = R Σ_n (J_n d_i)ᵀ ∇²c (J_n d_j)

so two Jacobian-vector products by forward-mode differentiation, on some of the batch, are all it takes; nothing is
backpropagated. Minimizing over c gives rate and momentum at once: d₁ is the natural gradient, d₂ the previous step.

Source: Martens and Grosse (2015), arXiv:1503.05671, sections 6.4 and 7.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from natgrad.capture import Forward
from natgrad.layers import at_least_float32
from natgrad.likelihoods import Likelihood
from natgrad.losses import Weights

# Data on which the model is evaluated. The relative error of M falls as its inverse square root; at 1,024 it is
# near 2 %.
MAX_DATA = 1024
_logger = logging.getLogger("natgrad")


class QuadraticModel:
    """Evaluates M for one model and loss.

    Args:
        model: The module; it runs a few times per evaluation, its buffers and the random stream stay as they are.
        likelihood: Of the loss.
        select: From the model's return value to the tensor that the loss sees.
        max_data: Of a larger batch, about this many data, evenly spread, stand for all.
    """

    def __init__(
        self, model: nn.Module, likelihood: Likelihood, select: Callable[[Any], Tensor], max_data: int = MAX_DATA
    ) -> None:
        self.model, self.likelihood, self.select, self.max_data = model, likelihood, select, max_data
        self._forward_mode = True

    def curvature(self, forward: Forward, terms: float, directions: Sequence[dict[str, Tensor]]) -> Tensor:
        """M, of shape (k, k) in float64.

        Args:
            forward: A forward pass.
            terms: What the reduction divides by, over the whole batch: more than that forward's when it was split.
            directions: k of them, as tensors by parameter name; other parameters do not move.
        """
        every = max(1, forward.data // self.max_data)
        args, kwargs = subsample(forward, every)
        adapt = rearrangement(forward)
        parameters = {name: self.model.get_parameter(name).detach() for name in directions[0]}

        def output(moving: dict[str, Tensor]) -> Tensor:
            # Copies made in here may be written to under differentiation; captured ones may not.
            buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
            return adapt(self.select(functional_call(self.model, {**moving, **buffers}, args, kwargs)))

        at, products = torch.empty(0), []
        for direction in directions:
            # The same dropout for every direction, and the user's random stream as it was.
            with torch.random.fork_rng(devices=_devices(parameters)), warnings.catch_warnings():
                tangent = {name: direction[name].to(parameter.dtype) for name, parameter in parameters.items()}
                at, product = self._product(output, parameters, tangent)
            products.append(at_least_float32(product))
        at = at_least_float32(at)
        weights = _subsample_weights(forward, every)
        root = 1.0 if weights is None else weights.curvature.sqrt()
        J = torch.stack([(product * root).flatten() for product in products])
        HJ = torch.stack([(root * self.likelihood.hessian_product(at, product)).flatten() for product in products])
        own: float = self.likelihood.terms(at)
        if weights is not None and self.likelihood.reduction == "mean":
            own = float(weights.terms.sum())
        return self.likelihood.scale(terms) * (terms / own) * (J @ HJ.mT).double()

    def _product(
        self, output: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor], direction: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The output, and its derivative along the direction."""
        if self._forward_mode:
            try:
                # torch 2.13 warns of its own use of it, at the first call.
                warnings.filterwarnings("ignore", message="`torch.jit.script`", category=DeprecationWarning)
                return torch.func.jvp(output, (parameters,), (direction,))  # type: ignore[return-value]  # no has_aux
            except (NotImplementedError, RuntimeError) as error:  # fused recurrent kernels, custom functions
                _logger.info("no forward-mode differentiation of this model, differences instead: %s", error)
                self._forward_mode = False
        return central_difference(output, parameters, direction)


def central_difference(
    output: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor], direction: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The output, and its derivative along the direction up to the ⅔ power of the rounding error."""
    size = torch.stack(torch._foreach_norm(list(parameters.values()))).norm()
    length = torch.stack(torch._foreach_norm(list(direction.values()))).norm()
    epsilon = torch.finfo(size.dtype).eps ** (1 / 3) * size / length.clamp(min=torch.finfo(size.dtype).tiny)
    random_state = torch.get_rng_state()

    def shifted(by: Tensor) -> Tensor:
        torch.set_rng_state(random_state)  # the same dropout on both sides
        return output({name: parameter + by * direction[name] for name, parameter in parameters.items()})

    ahead, behind = shifted(epsilon), shifted(-epsilon)
    return (ahead + behind) / 2, (ahead - behind) / (2 * epsilon)


def _devices(parameters: dict[str, Tensor]) -> list[torch.device]:
    return list({parameter.device for parameter in parameters.values() if parameter.device.type == "cuda"})


def subsample(forward: Forward, every: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with every k-th datum of each tensor whose first dimension is as long as the output's."""

    def take(value: Any) -> Any:
        return value[::every] if isinstance(value, Tensor) and value.ndim and value.shape[0] == forward.data else value

    return tuple(map(take, forward.args)), {key: take(value) for key, value in forward.kwargs.items()}


def _subsample_weights(forward: Forward, every: int) -> Weights | None:
    if forward.weights is None:
        return None
    return Weights(*(w.unflatten(0, (forward.data, -1))[::every].flatten(0, 1) for w in forward.weights))


def rearrangement(forward: Forward) -> Callable[[Tensor], Tensor]:
    """How the training loop turned the model's output into the loss module's input.

    Raises:
        ValueError: when it was neither handed on as it is, nor flattened to rows, nor its classes moved.
    """
    seen, output = forward.seen, forward.output
    if seen is None:
        return lambda out: out
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda out: out,
        lambda out: out.reshape(-1, *output.shape[1:]),
        lambda out: out.movedim(-1, 1),
        lambda out: out.movedim(1, -1).reshape(-1, output.shape[1]),
    ]
    for way in ways:
        try:
            same = way(seen)
        except RuntimeError:  # a shape that does not divide
            continue
        if same.shape == output.shape and torch.equal(same, output):
            return way
    raise ValueError(
        f"the loss module got an input of shape {tuple(output.shape)} that natgrad cannot trace to the model's output, "
        f"of shape {tuple(seen.shape)}: pass `output=` to natgrad, a function that makes the one from the other."
    )


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
