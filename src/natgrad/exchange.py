"""What the ranks of a data-parallel run tell each other in a step: statistics, inverses, natural gradients.

With a single process everything here leaves things as they are. Every rank must take part in every message, so whether
there is one is decided by what all ranks know; where they differ, all of them raise the same error.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from natgrad.batch import Batch
from natgrad.distributed import Piece, World
from natgrad.layers import Layer

State = dict[str, Any]


def share_batch(batch: Batch, layers: Sequence[Layer], world: World) -> None:
    """Make the statistics of a rank's batch those of all ranks', for the mean of their losses.

    Raises:
        RuntimeError: on every rank, when a layer's data or a backward pass were seen by some of them only.
    """
    if world.size == 1:
        return
    keys = [(layer.name, swapped) for layer in layers for swapped in (False, True)]
    known = [batch.statistics.get(key) for key in keys]
    rows = [number for sums in known for number in ((sums.rows, sums.of) if sums is not None else (0, 0))]
    forward = batch.latest
    own = 0.0 if forward is None else forward.terms(batch.loss.likelihood)
    came = _came(batch, layers)
    sums = world.sum([batch.terms, own, batch.criteria, *rows, *came.values()], layers[0].parameters[0]).tolist()
    for what, count in zip(came, sums[-len(came) :], strict=True):
        if count not in (0, world.size):
            raise RuntimeError(
                f"{what} came on {count:.0f} of {world.size} ranks: every rank must send data through the same layers "
                "and take as many steps as the others."
            )
    batch.terms, batch.criteria = sums[0] / world.size, sums[2]
    batch.part = own / sums[1] if sums[1] else 1 / world.size
    for one, chosen, of in zip(known, sums[3::2], sums[4::2], strict=False):
        if one is not None:
            one.rows, one.of = round(chosen), of
    inputs, gradients, squares = _sums(batch, layers)
    world.reduce([*inputs, *gradients, *squares], "factors")
    for piece in [*gradients, *squares]:
        piece.tensor.div_(world.size)


def _came(batch: Batch, layers: Sequence[Layer]) -> dict[str, bool]:
    """What a rank has seen, in an order that all share."""
    forward = batch.latest
    came = {"a backward pass of data": forward is not None and forward.gradient is not None and forward.data > 0}
    for layer in layers:
        for swapped, use in ((False, ""), (True, " as a tied one")):
            sums = batch.statistics.get((layer.name, swapped))
            came[f"data of layer {layer.name!r}{use}"] = sums is not None
            came[f"gradients of layer {layer.name!r}{use}"] = sums is not None and sums.G is not None
        came[f"squared gradients of layer {layer.name!r}"] = layer.name in batch.spectra
        came[f"samples of layer {layer.name!r}"] = layer.name in batch.samples
    return came


def _sums(batch: Batch, layers: Sequence[Layer]) -> tuple[list[Piece], list[Piece], list[Piece]]:
    """Over rows of x with their numbers, over rows of gradients, and of squares; in an order that all ranks share."""
    inputs, gradients = [], []
    for layer in layers:
        for swapped in (False, True):
            sums = batch.statistics.get((layer.name, swapped))
            if sums is not None and sums.A is not None and sums.weight is not None:
                inputs += [matrix(sums.A), Piece(sums.weight, False)]
                gradients += [] if sums.G is None else [matrix(sums.G)]
    squares = [Piece(batch.spectra[layer.name], False) for layer in layers if layer.name in batch.spectra]
    return inputs, gradients, squares


def matrix(factor: Tensor) -> Piece:
    """A symmetric factor, or a column that stands for a diagonal one."""
    return Piece(factor, factor.shape[-1] > 1)


def share_inverses(layers: Sequence[Layer], states: Mapping[str, State], names: Sequence[str], world: World) -> None:
    """Send the inverses of ``layers`` from their owners to the ranks that hold them.

    Args:
        layers: Whose factors were inverted.
        states: Of each layer, by name, with the factors A and G.
        names: Of the tensors that the inverse consists of.
        world: The ranks.
    """
    if world.size == 1 or world.holders == 1:
        return
    held = [layer.name for layer in layers if world.holds(layer.name)]
    for name in held:
        state = states[name]
        # Factorizations lay out by columns, and products with them would be rounded otherwise than the others'.
        own = {key: state[key].contiguous() for key in names} if world.owns(name) else blank(names, state)
        state.update(own)
    world.copy_in_row({name: inverse_pieces(names, states[name]) for name in held}, "inverses")


@contextmanager
def lent(layer: Layer, state: State, names: Sequence[str], world: World) -> Iterator[State]:
    """State with the layer's inverse in it, on every rank; where it is not held it is there for a moment only."""
    if world.replicates:
        yield state
        return
    borrowed = dict(state) if world.holds(layer.name) else {**state, **blank(names, state)}
    world.copy_in_column({layer.name: inverse_pieces(names, borrowed)}, "lent inverses")
    yield borrowed


def share_noise(measured: dict[str, Tensor], world: World) -> dict[str, list[float]]:
    """What :func:`natgrad.noise.measure` tells of all ranks' data from what it told of this one's, by layer name.

    They leave the device all at once, which then has to be waited for but once.
    """
    if not measured:
        return {}
    first = next(iter(measured.values()))
    sums = world.sum(torch.stack([sums.double().to(first.device) for sums in measured.values()]), first)
    # A datum's part of the mean over ranks is 1/W of what its own rank differentiates.
    sums /= torch.tensor([world.size, world.size**2, 1.0], dtype=sums.dtype)
    return dict(zip(measured, sums.tolist(), strict=True))


def share_solutions(solutions: dict[str, Tensor], world: World) -> None:
    """Replace matrices by layer name by those of the ranks that hold the layer's inverse."""
    if world.replicates:
        return
    # A holder's may be laid out by columns, and what is computed from it would be rounded otherwise than elsewhere.
    solutions.update((name, V.contiguous()) for name, V in solutions.items())
    world.copy_in_column({name: [Piece(V, False)] for name, V in solutions.items()}, "natural gradients")


def inverse_pieces(names: Sequence[str], state: State) -> list[Piece]:
    """The tensors that an inverse consists of; an age is one whenever it is sent, and not on the device of the rest."""
    sent = [name for name in names if not name.endswith("_age")]
    return [matrix(state[name]) if name.endswith("_inverse") else Piece(state[name], False) for name in sent]


def blank(names: Sequence[str], state: State) -> dict[str, Tensor]:
    """Room for an inverse of the factors in ``state``."""
    A, G = state["A"], state["G"]
    shapes = {"A": A.shape, "G": G.shape}
    product = (*A.shape[:-2], G.shape[-2], A.shape[-2])
    ages = {name: torch.ones((), dtype=torch.float64) for name in names if name.endswith("_age")}
    return {name: A.new_zeros(shapes.get(name.split("_")[0], product)) for name in names} | ages
