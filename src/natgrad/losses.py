"""What a user's ``loss`` argument means: a likelihood, and for a torch loss module the weights that its targets imply.

The curvature of most losses at the model's output depends on the output alone. Class weights, ignored targets, label
smoothing, soft targets and positive weights make it depend on the targets too, by a weight w on each criterion:

====================== ====================================== =========================================
module                 weight of the curvature                what ``"mean"`` divides by
====================== ====================================== =========================================
CrossEntropyLoss       Σ_k q_k w_k, zero where ignored        Σ w_y over what is not ignored; soft targets: their number
NLLLoss                w_y, zero where ignored                Σ w_y
BCEWithLogitsLoss      w (1 + (pos_weight − 1) y)             number of entries
GaussianNLLLoss        1 / variance                           number of entries
KLDivLoss              Σ_k q_k                                (not ``"mean"``, which torch is about to change)
HuberLoss, SmoothL1,   slope / error, at most its value near  number of entries
L1Loss                 zero error
====================== ====================================== =========================================

with q the target distribution after smoothing. Robust losses have no curvature, or none where errors are large; theirs
is that of the parabola which touches the loss at the error and nowhere lies below it (iteratively reweighted least
squares; Holland and Welsch 1977, DOI 10.1080/03610927708827533): a step that lowers it lowers the loss.

A target is seen only by the module, so these modules are hooked, and must be called in the training loop; vectors are
then drawn for the tensor that the module got, whatever its layout.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad.joint import Joint, Part
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, LogCategorical, Poisson, Reduction

# Sums of probabilities are one up to half precision. Of an absolute error the parabola is that of an error this small,
# in units of the mean one, where it is smaller still.
UNNORMALIZED, LEAST_ERROR = 0.02, 0.1


class Weights(NamedTuple):
    """Of the criteria, shaped like the output with one entry where the classes are.

    Attributes:
        curvature: Factor on ∇²c.
        terms: What each criterion adds to the divisor of a mean.
    """

    curvature: Tensor
    terms: Tensor


One: TypeAlias = str | nn.Module | Likelihood
"""The loss of one output."""
Weighted: TypeAlias = One | tuple[float, One]
"""The same, perhaps with the number by which it is multiplied in a sum of several."""
Declared: TypeAlias = One | Mapping[Any, Weighted] | Sequence[Weighted] | None
"""What a user may pass as ``loss``."""
Weigh = Callable[[Any, Tensor, tuple[Any, ...]], Weights]
"""From a loss module, its input and its other arguments to the weights."""


@dataclass(frozen=True)
class Loss:
    """A likelihood and, where the targets matter, the module to watch for them.

    Attributes:
        likelihood: None if no loss was given.
        function: From output and target to the loss, where it is known.
        module: The loss module that sees the targets.
        weigh: What it implies.
        indispensable: Whether the curvature cannot be known without the module; else it is only the ignored targets.
    """

    likelihood: Likelihood | None
    function: Callable[[Tensor, Tensor], Tensor] | None = None
    module: nn.Module | None = None
    weigh: Weigh | None = None
    indispensable: bool = False

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss itself.

        Raises:
            ValueError: for a bare likelihood, which does not tell.
        """
        if self.function is None:
            raise ValueError("the targets are needed here: pass `loss` as a name or as a torch loss module.")
        return self.function(output, target)


_BY_NAME: dict[str, tuple[type[Likelihood], Callable[[Tensor, Tensor], Tensor]]] = {
    "mse": (Gaussian, functional.mse_loss),
    "cross_entropy": (Categorical, functional.cross_entropy),
    "bce_with_logits": (Bernoulli, functional.binary_cross_entropy_with_logits),
}


def resolve(loss: Declared) -> Loss:
    """The meaning of a user's ``loss`` argument.

    Raises:
        ValueError: for an unknown name, or a loss module whose curvature is not known.
        TypeError: for anything else than a name, a torch loss module, a ``Likelihood``, some of these, or None.
    """
    if loss is None or isinstance(loss, Likelihood):
        return Loss(loss)
    if isinstance(loss, str):
        if loss not in _BY_NAME:
            names = ", ".join(map(repr, _BY_NAME))
            raise ValueError(f"`loss={loss!r}` is not known: use one of {names}, or a torch loss module.")
        likelihood, function = _BY_NAME[loss]
        return Loss(likelihood(), function)
    if isinstance(loss, nn.Module):
        return _from_module(loss)
    if isinstance(loss, Mapping):
        return _of_several(loss)
    if isinstance(loss, Sequence):
        return _of_several(dict(enumerate(loss)))
    if name := _meant(loss):
        raise TypeError(f"`loss` tells which loss the training loop computes, and does not compute it: pass {name}.")
    raise TypeError(
        "`loss` must be a name, a torch loss module or a `natgrad.likelihoods.Likelihood`, or a dictionary or a tuple "
        f"of these for several outputs, not {loss!r}."
    )


def _meant(loss: object) -> str | None:
    """What to pass for a function or a class that is the loss of a name or of a module."""
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        return f"an instance, `{loss.__name__}()`"
    names = [f'`"{name}"`' for name, (_, function) in _BY_NAME.items() if function is loss]
    called = getattr(loss, "__name__", "").replace("_", "").removesuffix("loss")
    modules = [kind.__name__ for kind in _MODULES if kind.__name__.lower().removesuffix("loss") == called]
    return next(iter(names + [f"an instance of `nn.{module}`, and call that in the loop" for module in modules]), None)


def _of_several(losses: Mapping[Any, Weighted]) -> Loss:
    weights, resolved = dict[Any, float](), dict[Any, Loss]()
    for key, loss in losses.items():
        weight, one = loss if isinstance(loss, tuple) and len(loss) == 2 else (1.0, loss)
        if not (isinstance(weight, float | int) and weight > 0):
            raise ValueError(
                f"`loss` of output {key!r} must be a loss or a pair of a positive number and a loss, not {loss!r}."
            )
        if not isinstance(one, str | nn.Module | Likelihood):
            raise TypeError(f"`loss` of output {key!r} must be the loss of one tensor, not {one!r}.")
        weights[key], resolved[key] = float(weight), resolve(one)
        if resolved[key].indispensable:
            raise ValueError(
                f"`loss` of output {key!r}, {one!r}: among several losses natgrad does not see the targets, by which "
                "this one weighs its criteria. Declare the same loss without weights, which serves as well in most "
                f"cases: {_unweighted(resolved[key].likelihood)}; and go on to call your own."
            )
    parts = {key: Part(weights[key], cast(Likelihood, one.likelihood)) for key, one in resolved.items()}
    return Loss(joint := Joint(parts), partial(_sum, joint, resolved))


def _unweighted(likelihood: Likelihood | None) -> str:
    """How to declare a loss that does not weigh its criteria: by name, if it has one."""
    names = {kind: f'"{name}"' for name, (kind, _) in _BY_NAME.items()}
    return names.get(type(likelihood), f"natgrad.likelihoods.{likelihood!r}")  # type: ignore[arg-type]


def _sum(joint: Joint, losses: Mapping[Any, Loss], output: Tensor, targets: Any) -> Tensor:
    """The weighted sum of several losses, from their outputs side by side, and from the targets by the same keys."""
    heads = dict(zip(joint.parts, joint.split(output), strict=True))
    each = [part.weight * losses[key].value(heads[key], targets[key]) for key, part in joint.parts.items()]
    return torch.stack(each).sum()


def _from_module(module: nn.Module) -> Loss:
    kind = _MODULES.get(type(module))
    if kind is None:
        raise ValueError(
            f"`loss={module!r}`: natgrad knows {', '.join(k.__name__ for k in _MODULES)}. {_hint(module)}For another "
            "loss pass a `natgrad.likelihoods.Likelihood` with the same curvature."
        )
    reduction = cast(Any, module).reduction
    if reduction == "none":
        raise ValueError(f"`loss={module!r}`: reduce with 'mean' or 'sum', so that the scale of the loss is known.")
    if isinstance(module, nn.KLDivLoss) and reduction == "mean":
        raise ValueError(
            f"`loss={module!r}`: torch is about to change what 'mean' divides by; reduce with 'batchmean'."
        )
    make, weigh = kind
    if isinstance(module, nn.BCEWithLogitsLoss) and module.weight is None and module.pos_weight is None:
        weigh = None
    weighs_always = weigh in (_weigh_gaussian, _weigh_divergence, _weigh_robust)
    options = any(getattr(module, name, None) is not None for name in ("weight", "pos_weight"))
    indispensable = options or weighs_always  # smoothed labels alone weigh as others do
    likelihood = make(module, cast(Reduction, reduction))
    return Loss(likelihood, module, module if weigh else None, weigh, indispensable)


def _weigh_cross_entropy(module: nn.CrossEntropyLoss, output: Tensor, others: tuple[Any, ...]) -> Weights:
    target: Tensor = others[0]
    classes = output.shape[1]
    weight = module.weight if module.weight is not None else output.new_ones(classes)
    smoothing = module.label_smoothing
    if target.is_floating_point():
        soft = target * (1 - smoothing) + smoothing / classes
        curvature = torch.tensordot(soft, weight, dims=([1], [0])).unsqueeze(1)
        return Weights(curvature, torch.ones_like(curvature))
    own, kept = _class_weights(weight, target, module.ignore_index)
    curvature = ((1 - smoothing) * own + smoothing * weight.mean()) * kept
    return Weights(curvature.unsqueeze(1), (own * kept).unsqueeze(1))


def _weigh_nll(module: nn.NLLLoss, output: Tensor, others: tuple[Any, ...]) -> Weights:
    weight = module.weight if module.weight is not None else output.new_ones(output.shape[1])
    own, kept = _class_weights(weight, others[0], module.ignore_index)
    return Weights((own * kept).unsqueeze(1), (own * kept).unsqueeze(1))


def _class_weights(weight: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Weight of each target's class, and whether it counts."""
    kept = target != ignore_index
    return weight[target.where(kept, 0)], kept


def _weigh_bernoulli(module: nn.BCEWithLogitsLoss, output: Tensor, others: tuple[Any, ...]) -> Weights:
    target: Tensor = others[0]
    positive = 1.0 if module.pos_weight is None else 1 + (module.pos_weight - 1) * target
    weight = 1.0 if module.weight is None else module.weight
    ones = torch.ones_like(output)
    return Weights(ones * positive * weight, ones)


def _weigh_gaussian(module: nn.GaussianNLLLoss, output: Tensor, others: tuple[Any, ...]) -> Weights:
    variance = others[1] if isinstance(others[1], Tensor) else torch.as_tensor(others[1])
    if variance.requires_grad:
        raise ValueError(
            f"`loss={module!r}` got a variance that the model learns: let the model return mean and variance as one "
            "tensor of shape (N, 2, …) and pass `loss=natgrad.likelihoods.MeanVariance()`."
        )
    ones = torch.ones_like(output)
    variance = variance.to(output)
    variance = variance if variance.ndim in (0, output.ndim) else variance.unsqueeze(-1)
    return Weights(ones / variance.clamp(min=module.eps), ones)


def _weigh_divergence(module: nn.KLDivLoss, output: Tensor, others: tuple[Any, ...]) -> Weights:
    target: Tensor = others[0].exp() if module.log_target else others[0]
    total = output.exp().sum(dim=1)
    if not torch.allclose(total, torch.ones_like(total), atol=UNNORMALIZED):
        raise ValueError(
            f"`loss={module!r}` needs logarithms of probabilities, with the classes in dimension 1, and got an input "
            f"of shape {tuple(output.shape)} whose probabilities do not sum to one there."
        )
    curvature = target.sum(dim=1, keepdim=True)
    return Weights(curvature, torch.ones_like(curvature))


def _weigh_robust(
    module: nn.HuberLoss | nn.SmoothL1Loss | nn.L1Loss, output: Tensor, others: tuple[Any, ...]
) -> Weights:
    error = (output - others[0]).abs()
    if isinstance(module, nn.HuberLoss):
        curvature = module.delta / error.clamp(min=module.delta)
    else:
        kink = getattr(module, "beta", 0.0) or float(LEAST_ERROR * error.mean()) or 1.0
        curvature = 1 / error.clamp(min=kink)
    return Weights(curvature, torch.ones_like(error))


def _hint(module: nn.Module) -> str:
    is_of_probabilities = isinstance(module, nn.BCELoss)
    return (
        "Of a model that returns probabilities return the logits, for BCEWithLogitsLoss. "
        if is_of_probabilities
        else ""
    )


def _of_weighed_errors(module: nn.Module, reduction: Reduction) -> Gaussian:
    """Of a squared error whose weights rise as errors fall, so that its gradient does not tell of progress."""
    likelihood = Gaussian(reduction, half=True)
    likelihood.of_residuals = False
    return likelihood


_MODULES: dict[type[nn.Module], tuple[Callable[[Any, Reduction], Likelihood], Weigh | None]] = {
    nn.MSELoss: (lambda module, reduction: Gaussian(reduction), None),
    nn.CrossEntropyLoss: (lambda module, reduction: Categorical(reduction), _weigh_cross_entropy),
    nn.BCEWithLogitsLoss: (lambda module, reduction: Bernoulli(reduction), _weigh_bernoulli),
    nn.NLLLoss: (lambda module, reduction: LogCategorical(reduction), _weigh_nll),
    nn.KLDivLoss: (lambda module, reduction: LogCategorical(reduction), _weigh_divergence),
    nn.HuberLoss: (_of_weighed_errors, _weigh_robust),
    nn.SmoothL1Loss: (_of_weighed_errors, _weigh_robust),
    nn.L1Loss: (_of_weighed_errors, _weigh_robust),
    nn.PoissonNLLLoss: (lambda module, reduction: Poisson(reduction, log_input=module.log_input), None),
    nn.GaussianNLLLoss: (_of_weighed_errors, _weigh_gaussian),
}
