"""Stage 4: sums over rows become factors, and factors a debiased running average.

What enters are the second moments of one layer's rows (:mod:`natgrad.layers.moments`); what leaves are A, of shape
([B,] in [+ 1], in [+ 1]), and G, of shape ([B,] out, out), with ``kron(G, A)`` the curvature block. With ΣA and ΣG the
sums of outer products, n the number of rows of x and R the scale of the loss, A = ΣA / n and G = R ΣG: all scale sits
in G, which is a sum over the batch and not a mean, as R already divides. Both sums add up over micro-batches, so the
factors do not depend on how a batch is split.

The running average is w ← ρ w + 1, F ← F + (F_new − F) / w: the mean of all factors seen, weighted by ρ to the power of
their age, without a bias towards the start. Source: Martens and Grosse (2015), arXiv:1503.05671.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import Tensor

from natgrad.layers import Moment, Sharing

# So many rows for each of its dimensions determine a factor well enough, damped as it will be; fewer are averaged over
# steps, with the decay that kfac-jax uses, or a longer one where they are very few.
ROWS_PER_DIMENSION, LONG_DECAY = 1, 0.95
# Where gradients are averaged over batches, so are factors, however many rows they have; and over as many more updates
# as these have fewer rows than determine them.
AVERAGED_DECAY = 0.8
# With `batch_fraction="auto"`, no fewer rows than these enter a factor, nor than this share of the data; more
# cost time, and those of a whole batch even some generalization (`docs/decisions.md`).
MIN_ROWS, MIN_SHARE = 512, 1 / 4
# Of the inputs of layers that see no positions more enter A, as these take no backward pass.
INPUT_SHARE = 1 / 2

Factors = tuple[Tensor, Tensor]
"""(A, G)."""


def resolve_sharing(sharing: str | Mapping[str, str], names: Sequence[str]) -> dict[str, Sharing]:
    """The kind of weight sharing of each layer: one word for all, or by name with ``"expand"`` for the rest.

    Raises:
        ValueError: for an unknown word or layer.
    """
    chosen = (
        dict.fromkeys(names, sharing) if isinstance(sharing, str) else {**dict.fromkeys(names, "expand"), **sharing}
    )
    for name, word in chosen.items():
        if name not in names:
            raise ValueError(f"`sharing` names {name!r}, which is not a layer; the layers are {', '.join(names)}.")
        if word not in get_args(Sharing):
            raise ValueError(f"`sharing` must be one of {get_args(Sharing)}, not {word!r}.")
    return cast(dict[str, Sharing], chosen)


@dataclass
class Statistics:
    """Sums of one use of one layer since the last step.

    Attributes:
        A: ΣA; the blocks that took part in a call, if there are blocks.
        weight: What ΣA is divided by; (B, 1, 1) if there are blocks.
        rows: Number of rows in ΣA.
        of: The same in the whole batch.
        G: ΣG, scaled up from the rows used to all rows of the batch.
    """

    blocks: int | None
    A: Tensor | None = None
    weight: Tensor | None = None
    rows: int = 0
    of: float = 0.0
    G: Tensor | None = None

    def add_inputs(self, moment: Moment, part: slice, weight: float) -> None:
        """Add the inputs of one call to the blocks ``part``, counted ``weight`` times; one block's count for all."""
        total = moment.total if weight == 1 else moment.total * weight
        if self.A is None or self.weight is None:
            shape = total.shape if self.blocks is None else (self.blocks, *total.shape[-2:])
            self.A = total.new_zeros(shape)
            self.weight = total.new_zeros(() if self.blocks is None else (self.blocks, 1, 1))
        self.A[part] += total
        self.weight[part if self.blocks else ...] += moment.weight * weight
        self.rows += moment.rows
        self.of += moment.rows * weight

    def add_gradients(self, total: Tensor, part: slice, weight: float) -> None:
        """Add the gradients of one call, counted ``weight`` times."""
        if self.G is None:
            self.G = total.new_zeros(total.shape if self.blocks is None else (self.blocks, *total.shape[-2:]))
        self.G[part] += total * weight

    def add(self, other: "Statistics") -> None:
        """Add other sums of the same use."""
        for name in ("A", "weight", "G"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, theirs if mine is None else mine if theirs is None else mine + theirs)
        self.rows += other.rows
        self.of += other.of

    def tensors(self) -> Iterator[Tensor]:
        """The sums there are."""
        yield from (t for t in (self.A, self.G) if t is not None)

    def factors(self, scale: float, zero: Tensor) -> Factors:
        """Hand over A, and G in units of the loss; ``zero`` stands for a G to which no gradient came.

        The sums become the factors in place, and are gone: they are as large as all that is kept of a layer's factors.
        """
        assert self.A is not None
        assert self.weight is not None
        A, G, self.A, self.G = self.A, self.G, None, None
        return A.div_(self.weight.clamp(min=1)), zero if G is None else G.mul_(scale)


def join(one: Factors, other: Factors) -> Factors:
    """The Kronecker product with the partial traces of kron(G₁, A₁) + kron(G₂, A₂).

    Where A₁ ∝ A₂ or G₁ ∝ G₂ it is the sum itself. A smaller A lacks the row and column of a bias, and is padded with
    zeros. A diagonal next to a dense factor becomes dense.
    """
    A1, A2 = _alike(one[0], other[0])
    G1, G2 = _alike(one[1], other[1])
    a1, a2, g1, g2 = (_trace(F) for F in (A1, A2, G1, G2))
    total = (a1 * g1 + a2 * g2).clamp(min=torch.finfo(A1.dtype).tiny)
    g = (g1 + g2).clamp(min=torch.finfo(A1.dtype).tiny)
    return (g1 * A1 + g2 * A2) / g, (a1 * G1 + a2 * G2) * (g / total)


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    size, diagonal = max(one.shape[-2], other.shape[-2]), one.shape[-1] == other.shape[-1] == 1
    return grown(one, size, diagonal), grown(other, size, diagonal)


def grown(factor: Tensor, size: int, diagonal: bool) -> Tensor:
    """A factor of ``size`` dimensions, dense unless ``diagonal``; what it lacks is zero."""
    dense = factor.squeeze(-1).diag_embed() if factor.shape[-1] == 1 and not diagonal else factor
    missing = size - dense.shape[-2]
    return torch.nn.functional.pad(dense, (0, 0 if diagonal else missing, 0, missing)) if missing else dense


def _trace(F: Tensor) -> Tensor:
    return F.sum() if F.shape[-1] == 1 else F.diagonal(dim1=-2, dim2=-1).sum()


def share_known(rows: float, dimension: int) -> float:
    """Which part of the rows that determine factors of at most ``dimension`` a batch of so many has; 1 if all."""
    return min(1.0, float(rows) / (ROWS_PER_DIMENSION * dimension))


def automatic_decay(share: float, averages: bool) -> float:
    """Of the running average of factors for which a batch has a ``share`` of the rows that determine them.

    Where it has all, no average is needed: factors move fast early in training, and a stale one costs more than a noisy
    one as soon as the noise is bearable. ``docs/decisions.md`` has the measurements.

    Args:
        share: As of :func:`share_known`.
        averages: Whether gradients are averaged over batches.
    """
    if share == 1 and not averages:
        return 0.0
    decay = AVERAGED_DECAY + (1 - AVERAGED_DECAY) * (1 - share)
    return decay if averages else max(decay, LONG_DECAY)


def share_needed(rows: int, data: int, dimension: int) -> float:
    """Which part of a batch is enough for factors of at most ``dimension``; above 1 if none is.

    Args:
        rows: Of all its data, one for each position.
        data: Their number.
        dimension: Of the larger factor.
    """
    return max(MIN_ROWS, MIN_SHARE * data, ROWS_PER_DIMENSION * dimension) / max(rows, 1)


def share_of_inputs(rows: int, data: int) -> float:
    """Which part of a batch of so many rows and data enters A, if no more is needed."""
    return INPUT_SHARE if rows == data else 0.0


def flush(average: Tensor) -> None:
    """Let entries that are next to nothing be nothing, in place.

    Where nothing is added any more, as for a unit that is dead, an average ends in numbers so small that arithmetic on
    them takes ten times as long.
    """
    precision = torch.finfo(average.dtype)
    average.copy_(torch.nn.functional.hardshrink(average, precision.tiny / precision.eps))


def update_average(state: dict[str, Tensor], new: Mapping[str, Tensor], decay: float, age: str = "age") -> None:
    """Fold ``new`` tensors into those of the same names, debiased by ``state[age]``, their total weight w."""
    if age not in state:
        state.update({**new, age: torch.ones((), dtype=torch.float64)})
        return
    state[age].mul_(decay).add_(1.0)
    share = 1.0 / state[age].item()
    for name, tensor in new.items():
        latest = tensor.to(state[name].dtype)
        state[name] = latest if share == 1 else state[name].lerp_(latest, share)
