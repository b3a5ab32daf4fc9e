"""Derivatives of a network's outputs along directions in its parameters, without a backward pass.

Forward-mode differentiation is exact, and takes as long as three to five forward passes for each direction. Where
float32 is all that is asked for, a difference takes one:

    J d ≈ (f(θ + ε d) − f(θ)) / ε

with ε d a hundredth as long as the latest step: short beside a step within which the quadratic model was good enough,
and long enough for the outputs to differ by more than their rounding, or else it is not used. It magnifies rounding a
thousandfold; where there is little to be gained, derivatives are exact, and runs agree to rounding. The outputs of a
network that differentiates itself are small differences of large terms, and more than their own rounding is in them:
there a difference looks further, and must be larger.

A network may jump where its backward pass pretends that it does not, as quantized and spiking units do. A difference
across a jump is as large as the distance is short, so that one is compared with the derivative at first, and once more
when steps are shorter. What the outputs of such a network do over a step is neither: there differences look half a
percent of the parameters' length to both sides. Where even these are several times as long as the derivative, as of
codes that are looked up, they are mostly jumps that come and go, and the derivative that is pretended serves better.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from natgrad.memory import State, number
from natgrad.products import multiplies_as_stored

# Of the latest step, how far a difference looks; and the least relative change of the outputs that it believes, a
# thousand times the rounding of float32.
REACH, LEAST_CHANGE = 0.01, 1e-4
# The same for networks that differentiate themselves.
OWN_REACH, OWN_LEAST_CHANGE = 0.3, 0.02
# Parameters times data below which the passes through the network are not what a step costs.
LARGE = 2_000_000
_logger = logging.getLogger("natgrad")

# A difference is the derivative if it is no further from it, relative to its length; looked at again after some steps.
SMOOTH, AGAIN = 0.3, 16
# One over half a percent of the parameters' length serves in its place if it is no further from it than that.
FAR = 2.5

Named = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Function = Callable[[Named], Outputs]


class Agreement:
    """Whether two ways lead to the same numbers, seen twice.

    Args:
        state: Of the first layer's first parameter; under ``name``, how often they did, or 0 once they did not. A
            resumed run goes on with it.
        name: Of what is compared.
        tolerance: How far apart they may be, relative to their length.
    """

    def __init__(self, state: State, name: str, tolerance: float) -> None:
        self._state, self._name, self._tolerance = state, name, tolerance

    @property
    def is_due(self) -> bool:
        """Whether to look."""
        seen = float(self._state[self._name]) if self._name in self._state else None
        return seen is None or (seen == 1 and float(self._state["step"]) >= AGAIN)

    @property
    def is_sure(self) -> bool:
        """Whether they do, and one need not look."""
        return not (self.is_due or self.is_refuted)

    @property
    def is_refuted(self) -> bool:
        """Whether they do not."""
        return self._name in self._state and not self._state[self._name]

    def learn(self, quick: Tensor, sure: Tensor) -> None:
        """Compare the two."""
        apart = torch.linalg.vector_norm(quick - sure) > self._tolerance * torch.linalg.vector_norm(sure)
        self._state[self._name] = number(0.0 if apart else 1.0 + (self._name in self._state))

    def refutes(self, quick: Tensor, sure: Callable[[], tuple[Outputs, Outputs]]) -> bool:
        """Whether they do not, once the last of ``sure``'s second outputs was looked at where that is due."""
        if self.is_due:
            self.learn(quick, sure()[1][-1])
        return self.is_refuted

    def refute(self) -> None:
        """They are not to be compared."""
        self._state[self._name] = number(0.0)


class Jumps:
    """What is known of a network's jumps.

    Args:
        state: Of the first layer's first parameter.

    Attributes:
        short: Whether short differences are derivatives.
        wide: Whether those over half a percent of the parameters' length, if not, are near enough.
    """

    def __init__(self, state: State) -> None:
        self.short, self.wide = Agreement(state, "smooth", SMOOTH), Agreement(state, "wide", FAR)

    @property
    def are_crossed(self) -> bool:
        """Whether differences across jumps stand for derivatives."""
        return self.short.is_refuted and not self.wide.is_refuted


class ForwardMode:
    """Whether torch differentiates the network forwards; where it once failed, it is not tried again.

    Args:
        state: Of the first layer's first parameter; None for a network that is looked at once.
        draws: Whether the network draws numbers. Transforms of ``torch.func`` draw others from the same random stream
            where tensors are not laid out row by row, and so are no way then.
    """

    _NAME = "differences"

    def __init__(self, state: State | None = None, draws: bool = False) -> None:
        self._state, self._draws = {} if state is None else state, draws

    def ways(self, dtypes: set[torch.dtype]) -> list[Callable[[Function, Named, Named], tuple[Outputs, Outputs]]]:
        """Those to be tried, by the dtypes of the parameters."""
        if self.fails:
            return []
        if self._draws:
            return [by_dual_numbers]
        return [_by_transform] if dtypes == {torch.float64} else [_by_transform, by_dual_numbers]

    @property
    def fails(self) -> bool:
        """Whether it failed, so that derivatives are differences."""
        return self._NAME in self._state

    def fail(self, reason: str) -> None:
        """Note that it did."""
        self._state[self._NAME] = number(1.0)
        _tell_once(reason)


def along(
    output: Function,
    parameters: Named,
    directions: Sequence[Named],
    previous: Named | None,
    data: float,
    before: Outputs | None = None,
    differentiates: Callable[[], bool] = lambda: False,
    jumps: Jumps | None = None,
    forward_mode: ForwardMode | None = None,
) -> tuple[Outputs, list[Tensor]]:
    """The outputs, and derivatives of the last of them along each direction.

    Args:
        output: From the parameters to the outputs; the same for the same parameters.
        parameters: Where.
        directions: By name of the parameter, each with a tensor for every parameter.
        previous: The latest step; where there is none, or none that moved, everything is exact.
        data: How many the batch has, of which these outputs may be few; on all ranks.
        before: The outputs at these parameters, if they are known.
        differentiates: Whether the network was seen to differentiate itself; asked when outputs are known.
        jumps: Those of the network; none, if left out.
        forward_mode: As for ``directional_derivative``.
    """
    large = data * sum(p.numel() for p in parameters.values()) >= LARGE
    step = 0.0
    is_smooth = jumps is None or not jumps.short.is_refuted
    if previous is not None and large and is_smooth and _rounds_like_float32(parameters):
        step = float(length(previous.values()))
    if before is None and step > 0:
        before = output(parameters)
    reach, least = (OWN_REACH, OWN_LEAST_CHANGE) if differentiates() else (REACH, LEAST_CHANGE)
    products = []
    for direction in directions:
        exact = partial(directional_derivative, output, parameters, direction, before, forward_mode)
        product = None
        if before is not None and step > 0:
            product = short_difference(output, parameters, direction, before[-1], reach * step, least)
        if product is not None and jumps is not None and not differentiates() and jumps.short.refutes(product, exact):
            product = None
        if product is None and jumps is not None and jumps.are_crossed:
            before, (*_, product) = central_difference(output, parameters, direction, before)
            if jumps.wide.refutes(product, exact):
                product = None
        if product is None:
            before, (*_, product) = exact()
        products.append(product)
    return before or (), products


def short_difference(
    output: Function, parameters: Named, direction: Named, before: Tensor, reach: float, least: float
) -> Tensor | None:
    """The derivative of the last output, from a forward pass at the distance ``reach``; None if rounding would show.

    It would, where the output changes by less than ``least``, relative to its size.
    """
    epsilon = reach / length(direction.values()).clamp(min=torch.finfo(torch.float32).tiny)
    change = output({name: torch.addcmul(p, epsilon, direction[name]) for name, p in parameters.items()})[-1] - before
    return change / epsilon if change.norm() > least * before.norm() else None


def directional_derivative(
    output: Function,
    parameters: Named,
    direction: Named,
    before: Outputs | None = None,
    forward_mode: ForwardMode | None = None,
) -> tuple[Outputs, Outputs]:
    """The outputs and their derivatives along the direction: exact by forward-mode differentiation, if there is one.

    In float64 differences are exact enough, and faster than dual numbers.

    Args:
        output: As for ``along``.
        parameters: Where.
        direction: A tensor for every parameter.
        before: The outputs, if they are known.
        forward_mode: What is known of that.
    """
    forward_mode = forward_mode or ForwardMode()
    reason = None
    for way in forward_mode.ways({p.dtype for p in parameters.values()}):
        try:
            return way(output, parameters, direction)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:  # fused kernels, custom functions
            reason = repr(error)
    if reason is not None:
        forward_mode.fail(reason)
    return central_difference(output, parameters, direction, before)


def pulled_back(output: Function, parameters: Named, gradient: Tensor) -> Named:
    """The gradient at the first output times its Jacobian, by a backward pass, which jumps do not disturb."""
    with torch.enable_grad():
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        outputs, *_ = output(leaves)
        if not outputs.requires_grad:  # as where a pass makes no use of them
            return {name: torch.zeros_like(p) for name, p in parameters.items()}
        pulled = torch.autograd.grad(outputs, list(leaves.values()), gradient, materialize_grads=True)
    return dict(zip(leaves, pulled, strict=True))


def _by_transform(output: Function, parameters: Named, direction: Named) -> tuple[Outputs, Outputs]:
    _load_rules()
    return torch.func.jvp(output, (parameters,), (direction,))  # type: ignore[return-value]  # no has_aux


@functools.cache
def _load_rules() -> None:
    """Let torch load its rules, when it warns of its own code: 2.13 by a DeprecationWarning, 2.14 a FutureWarning.

    Once only, as Python shows all warnings of the process anew after any filter was changed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.script`")
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


def by_dual_numbers(output: Function, parameters: Named, direction: Named) -> tuple[Outputs, Outputs]:
    """The outputs and their derivatives along the direction, also in a network that calls autograd itself, or draws."""
    _load_rules()
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, direction[name]) for name, p in parameters.items()}
        pairs = [forward_ad.unpack_dual(dual) for dual in output(duals)]
    outputs = tuple(pair.primal.detach() for pair in pairs)
    return outputs, tuple(
        torch.zeros_like(primal) if pair.tangent is None else pair.tangent.detach()
        for primal, pair in zip(outputs, pairs, strict=True)
    )


def without_graph(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same numbers, dual ones as they are: these lose their derivatives when they are detached."""
    one, other = (t if forward_ad.unpack_dual(t).tangent is not None else t.detach() for t in outputs)
    return one, other


def central_difference(
    output: Function, parameters: Named, direction: Named, before: Outputs | None = None
) -> tuple[Outputs, Outputs]:
    """The outputs, if not known ``before``, and their derivatives up to the ⅔ power of the rounding error."""
    size = length(parameters.values())
    epsilon = (
        torch.finfo(size.dtype).eps ** (1 / 3)
        * size
        / length(direction.values()).clamp(min=torch.finfo(size.dtype).tiny)
    )

    def shifted(by: Tensor) -> Outputs:
        return output({name: parameter + by * direction[name] for name, parameter in parameters.items()})

    slopes = [
        (ahead - behind) / (2 * epsilon) for ahead, behind in zip(shifted(epsilon), shifted(-epsilon), strict=True)
    ]
    return output(parameters) if before is None else before, tuple(slopes)


def length(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean length of all of them together; a scalar."""
    norm: Tensor = torch.stack(torch._foreach_norm(list(tensors))).norm()
    return norm


def _rounds_like_float32(parameters: Named) -> bool:
    """Not so on accelerators, which may multiply with fewer digits than they store."""
    stored = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in parameters.values())
    return stored and multiplies_as_stored()


@functools.cache
def _tell_once(reason: str) -> None:
    _logger.info("no forward-mode differentiation of this model, differences instead: %s", reason)
