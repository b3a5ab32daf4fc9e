"""The model once more, on some of the data of a forward pass, as if nobody had called it.

What enters is a :class:`~natgrad.forward.Forward`, what leaves is what the model makes of a part of its data. Stage 7
measures curvature and loss there, and stage 3 sends its own vectors back through such a pass where that comes to the
same as through the user's, and to much less work: the gradient of a datum does not depend on the others, unless they
meet in batch statistics, and not on chance, unless there is dropout. Whether it does is seen at the outputs.
"""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from natgrad.calls import Call
from natgrad.chance import Chance, streams_left_alone
from natgrad.distributed import is_sharded, shards_left_alone
from natgrad.forward import Forward
from natgrad.layers import uncompiled
from natgrad.losses import Weights
from natgrad.torch_internals import forward_hooks

# A second pass pays with this share of the data or less: it goes forward and back, where the user's goes back.
SHARE = 1 / 4
# Outputs are the same data's when they differ by less than this, relative to their size, or by half of the digits.
SAME = 0.01
HALF = (torch.float16, torch.bfloat16)
# What a model raises that does not take some of the data alone, as it is made for one size of batch or relates them.
REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)

# Attributes that torch gives every module.
_BOOKKEEPING = vars(nn.Module()).keys()
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
# Of each module, the attributes that a pass of natgrad's was seen to write to in place.
_WRITTEN = WeakKeyDictionary[nn.Module, set[str]]()

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional ones, and those by keyword."""


def rerun(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    chance: Chance | None = None,
) -> Any:
    """What the model returns with ``tensors`` in the place of its parameters of these names.

    Its buffers, its attributes and the random streams stay as they are, so that dropout is the same every time.

    Args:
        model: The module.
        tensors: By the names of parameters.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        chance: Where its random streams begin, if not as they are now.
    """
    args, kwargs = in_other_containers((args, kwargs))
    # Copies made in here may be written to under differentiation; captured ones may not.
    at, copies = places(model), {name: buffer.clone() for name, buffer in model.named_buffers()}
    everywhere = {place: tensor for name, tensor in {**tensors, **copies}.items() for place in at[name]}
    with attributes_left_alone(model), streams_left_alone(model), shards_left_alone(model), uncompiled(model):
        if chance is not None:
            chance.restore()
        # Torch would find these places itself, and leave other tensors in modules that are registered twice.
        with _fast_paths_left_out():
            return functional_call(model, everywhere, args, kwargs, tie_weights=False)


@contextmanager
def _fast_paths_left_out() -> Iterator[None]:
    """Without gradients, torch's transformers in ``eval`` mode make something else of padded positions."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def modes(model: nn.Module) -> tuple[bool, ...]:
    """Which modules are in training mode."""
    return tuple(module.training for module in model.modules())


def in_other_containers(arguments: Arguments) -> Arguments:
    """The same tensors, and whatever else; the model may take things out of lists and dictionaries."""
    return cast(Arguments, tree_map(lambda leaf: leaf, arguments))


@contextmanager
def in_modes(model: nn.Module, training: tuple[bool, ...]) -> Iterator[None]:
    """Each module as it was during a pass, though the loop may have called ``model.eval()`` since."""
    before = modes(model)
    if training == before or len(training) != len(before):
        yield
        return
    modules = list(model.modules())
    try:
        for module, was in zip(modules, training, strict=True):
            module.training = was
        yield
    finally:
        for module, is_now in zip(modules, before, strict=True):
            module.training = is_now


def places(model: nn.Module) -> dict[str, list[str]]:
    """Where each parameter and buffer is, by its name: there, and under other names where modules share it."""
    first, found = dict[int, str](), dict[str, list[str]]()
    for prefix, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                name = f"{prefix}.{key}" if prefix else key
                found.setdefault(first.setdefault(id(tensor), name), []).append(name)
    return found


@contextmanager
def attributes_left_alone(model: nn.Module) -> Iterator[None]:
    """What modules note in their attributes in here, such as a penalty for the loop to add, is not there afterwards.

    Lists, dictionaries, sets and queues get back what was in them, too, and tensors that are no buffers their numbers,
    once one was seen to be written to; not so what is further inside.
    """
    modules = list(model.modules())
    before = [{name: vars(m)[name] for name in vars(m).keys() - _BOOKKEEPING} for m in modules]
    contents = [(value, value.copy()) for kept in before for value in kept.values() if type(value) in _CONTAINERS]
    with _tensors_left_alone(dict(zip(modules, before, strict=True))):
        try:
            yield
        finally:
            for module, kept in zip(modules, before, strict=True):
                for name in vars(module).keys() - _BOOKKEEPING - kept.keys():
                    del vars(module)[name]
                vars(module).update(kept)
            for value, content in contents:
                value.clear()
                value.extend(content) if isinstance(value, list | deque) else value.update(content)


@contextmanager
def _tensors_left_alone(attributes: Mapping[nn.Module, Mapping[str, Any]]) -> Iterator[None]:
    """Passes write to copies of the tensors that earlier ones have written to; of all, copies may take much memory."""
    held = [
        (module, name, value)
        for module, named in attributes.items()
        for name, value in named.items()
        if isinstance(value, Tensor) and not value.is_inference()
    ]
    for module, name, value in held:
        if name in _WRITTEN.get(module, ()):
            vars(module)[name] = value.clone()
    versions = [value._version for _, _, value in held]
    try:
        yield
    finally:
        for (module, name, value), version in zip(held, versions, strict=True):
            if value._version != version:
                _WRITTEN.setdefault(module, set()).add(name)


def subsample(forward: Forward, chosen: Tensor) -> Arguments | None:
    """The arguments with the chosen data of each tensor whose first dimension is as long as the output's.

    Tensors are found in tuples, lists and dictionaries, too. None if there is no such tensor, or if another one, of
    whole numbers, may tell data by their places in the batch, as the edges of a graph do.
    """
    leaves, structure = tree_flatten((forward.args, forward.kwargs))
    of_data = [isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == forward.data for leaf in leaves]
    others = [leaf for leaf, is_of_data in zip(leaves, of_data, strict=True) if not is_of_data]
    if not any(of_data) or any(_tells_places(other, len(chosen)) for other in others):
        return None
    taken = [
        leaf.detach()[chosen].requires_grad_(leaf.requires_grad) if is_of_data else leaf
        for leaf, is_of_data in zip(leaves, of_data, strict=True)
    ]
    return cast(Arguments, tree_unflatten(taken, structure))


def widened(arguments: Arguments, model: nn.Module) -> Arguments:
    """In single precision where half would need the user's autocast, without which natgrad's passes are.

    That is where no parameter is of half precision.
    """

    def widen(leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in HALF else leaf

    needed = all(p.dtype not in HALF for p in model.parameters())
    return cast(Arguments, tree_map(widen, arguments)) if needed else arguments


def _tells_places(value: Any, kept: int) -> bool:
    """Whether some of these may be places in a batch that has only so many left."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        return False
    return value.numel() > 0 and int(value.max()) >= kept


def stratified(order: Tensor, size: int, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the data that stand for all: those of the longest gradients, and others in a random order.

    Args:
        order: The data, shuffled; the factors take theirs from its start. The others are taken from its end: on the
            very data whose factors made the direction, its curvature would look too small.
        size: How many to choose.
        gradients: Of the loss at the output, a row for each datum.

    Returns:
        The chosen, and what each counts, 1 on average: a sum over them with these weights has the sum over all, times
        ``size`` over their number, as its expectation.
    """
    data, top = len(order), size // 2
    longest = gradients.norm(dim=1).topk(top).indices
    is_left = torch.ones(data, dtype=torch.bool, device=order.device).index_fill(0, longest, False)
    others = order[is_left[order].argsort(stable=True)][top - size :]
    share = size / data
    counts = torch.tensor([1.0, (data - top) / (size - top)]).repeat_interleave(torch.tensor([top, size - top]))
    return torch.cat([longest, others]), share * counts.to(order.device)


def few(forward: Forward, independent: bool) -> Tensor | None:
    """The data that enter any factor, if they are so few that it pays to run the model on them alone.

    Args:
        forward: The pass of all data.
        independent: Whether the vectors to be sent back are, from datum to datum. Then rows that all data share, as
            those of positions, get as much from a few of them as from all, but for a factor.
    """
    calls = [call for use in forward.uses for call in use]
    own = [call for call in calls if call.rows == forward.data]
    # Those of one call are the first of those of another, as long as both were drawn among the data.
    drawn = [call.data for call in own if isinstance(call.data, Tensor)]
    if not drawn or forward.lengths or len(drawn) < len(own) or not (independent or len(own) == len(calls)):
        return None
    if forward.chance is not None:  # fewer data draw other numbers
        return None
    if forward.seen is not None and forward.seen is not forward.output:
        return None
    largest = max(drawn, key=len)
    return largest if len(largest) <= SHARE * forward.data else None


def again(model: nn.Module, forward: Forward, chosen: Tensor, select: Callable[[Any], Tensor]) -> Forward | None:
    """A pass of the chosen data alone, calls of layers aside; None if the model does not take so few, or is sharded.

    Args:
        model: The module, with its own parameters.
        forward: A pass of all data.
        chosen: Which.
        select: From the model's return value to the tensor that the loss sees.
    """
    if any(map(is_sharded, model.parameters())):
        return None
    try:
        with torch.enable_grad():
            arguments = subsample(forward, chosen)
            if arguments is None:
                return None
            output = select(rerun(model, {}, *arguments))
    except REFUSALS:
        return None
    weights = None if forward.weights is None else Weights(*(weight[chosen] for weight in forward.weights))
    return Forward(*arguments, output, [], weights)


def is_watched(model: nn.Module, own: set[int]) -> bool:
    """Whether hooks of others on the model, too, would take some of the data for all of them; ``own`` are ours."""
    return any(not own.issuperset(forward_hooks(module)) for module in model.modules())


def stands_for(part: Forward, uses: list[list[Call]], whole: Forward, chosen: Tensor) -> bool:
    """Whether a pass of the chosen data is what the whole pass was for them; its calls then count as those did.

    Args:
        part: The pass, which gets the calls.
        uses: Its calls of layers.
        whole: The pass of all data.
        chosen: Which.
    """
    output, expected = part.output.detach(), whole.output.detach()[chosen]
    mine, theirs = ([call for use in pass_ for call in use] for pass_ in (uses, whole.uses))
    if output.shape != expected.shape or [call.layer for call in mine] != [call.layer for call in theirs]:
        return False
    tolerance = min(SAME, torch.finfo(output.dtype).eps ** 0.5)
    if not torch.linalg.vector_norm(output - expected) <= tolerance * torch.linalg.vector_norm(expected):
        return False
    for call, before in zip(mine, theirs, strict=True):
        if before.rows == whole.data and len(call.x) == len(chosen):
            call.data, call.upscale = slice(len(before.x)), before.upscale
        elif len(call.x) == before.rows:  # of what all data share, perhaps as many as data
            call.data, call.upscale = before.data, before.upscale * whole.data / len(chosen)
        else:  # rows of the data after all, several of each
            return False
        call.x = call.x[call.data]
    part.uses = uses
    return True


def wants_gradients(error: RuntimeError) -> bool:
    """Whether a network differentiates itself, or keeps gradients of what is in it, and met none."""
    return any(text in str(error) for text in ("does not require grad", "can't retain_grad"))
