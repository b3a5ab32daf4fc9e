"""Stage 4: rows become factors, and factors a debiased running average.

What enters are the rows of one layer, (N, S, in) of its inputs and (N, S, out) of the gradients at its outputs; what
leaves are A, of shape (in [+ 1], in [+ 1]), and G, of shape (out, out), with ``kron(G, A)`` the curvature block. With
ΣA and ΣG the sums of outer products over all rows of a batch, R the scale of the loss and n the number of rows of x:

    expand   A = ΣA / n          G = R ΣG        every position is a datum of its own
    reduce   A = ΣA / (N S²)     G = R ΣG        rows summed over the positions first; the appended 1 becomes S

All scale sits in G, which is therefore in units of the loss: a sum over the batch, not a mean, as R already divides.
Both sums add up over micro-batches, so the factors do not depend on how a batch is split.

The running average is w ← ρ w + 1, F ← F + (F_new − F) / w: the mean of all factors seen, weighted by ρ to the power of
their age, without a bias towards the start. Sources: Martens and Grosse (2015), arXiv:1503.05671; Eschenhagen et al.
(2023), arXiv:2311.00636 (expand and reduce).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

Sharing = Literal["expand", "reduce"]

# So many rows for each of its dimensions make a factor well conditioned by themselves; fewer are averaged over steps,
# with the decay that kfac-jax uses.
ROWS_PER_DIMENSION, LONG_DECAY = 2, 0.95


def resolve_sharing(sharing: str | Mapping[str, str], names: list[str]) -> dict[str, Sharing]:
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


def second_moment(rows: Tensor, bias: bool) -> Tensor:
    """Sum of x xᵀ over the rows, x extended by a 1 when ``bias``, without building the extended rows.

    Args:
        rows: (n, d).
        bias: Whether a 1 is appended to each row.

    Returns:
        (d, d), or (d + 1, d + 1).
    """
    gram = rows.mT @ rows
    if not bias:
        return gram
    return _border(gram, rows.sum(0), float(rows.shape[0]))


def _border(gram: Tensor, total: Tensor, corner: float) -> Tensor:
    d = gram.shape[-1]
    bordered = gram.new_empty(d + 1, d + 1)
    bordered[:d, :d] = gram
    bordered[:d, d] = bordered[d, :d] = total
    bordered[d, d] = corner
    return bordered


def at_least_float32(rows: Tensor) -> Tensor:
    """Statistics never have less precision than float32."""
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()


@dataclass
class Statistics:
    """Sums of one layer since the last step.

    Attributes:
        A: ΣA.
        A_weight: What ΣA is divided by.
        rows: Number of rows in ΣA.
        G: ΣG, scaled up from the rows used to all rows of the batch.
    """

    A: Tensor | None = None
    A_weight: float = 0.0
    rows: int = 0
    G: Tensor | None = None

    def add_inputs(self, x: Tensor, bias: bool, sharing: Sharing) -> None:
        """Add the rows (N, S, in) of one call."""
        x = at_least_float32(x)
        n, positions, width = x.shape
        rows, weight = n, float(n * positions**2)
        if sharing == "expand" or positions == 1:
            rows = n * positions
            gram, weight = second_moment(x.reshape(-1, width), bias), float(rows)
        else:
            total = x.sum(1)  # (N, in)
            gram = total.mT @ total
            if bias:
                gram = _border(gram, total.sum(0) * positions, float(n * positions**2))
        self.rows += rows
        self.A = gram if self.A is None else self.A.add_(gram)
        self.A_weight += weight

    def add_gradients(self, g: Tensor, sharing: Sharing, weight: float) -> None:
        """Add the rows (N, S, out) of one call, each counted ``weight`` times."""
        g = at_least_float32(g)
        rows = g.reshape(-1, g.shape[-1]) if sharing == "expand" else g.sum(1)
        gram = (rows.mT @ rows).mul_(weight)
        self.G = gram if self.G is None else self.G.add_(gram)

    def tensors(self) -> Iterator[Tensor]:
        """The sums there are."""
        yield from (t for t in (self.A, self.G) if t is not None)

    def factors(self, scale: float) -> tuple[Tensor, Tensor | None]:
        """A, and G in units of the loss; G is None where no gradient arrived."""
        assert self.A is not None
        return self.A / self.A_weight, None if self.G is None else self.G * scale


def choose_decay(rows: int, dimension: int) -> float:
    """ρ for a batch that gives ``rows`` rows to factors of at most ``dimension``: 0 where these suffice by themselves.

    Factors move fast early in training, and a stale factor costs more than a noisy one as soon as the noise is
    bearable: ``docs/decisions.md`` has the measurements.
    """
    return 0.0 if rows >= ROWS_PER_DIMENSION * dimension else LONG_DECAY


def update_average(state: dict[str, Tensor], A: Tensor, G: Tensor, decay: float) -> None:
    """Fold new factors into ``state["A"]`` and ``state["G"]``, debiased by ``state["age"]``, the total weight w."""
    if "A" not in state:
        state.update(A=A, G=G, age=torch.ones((), dtype=torch.float32))
        return
    state["age"].mul_(decay).add_(1.0)
    share = 1.0 / state["age"].item()
    state["A"].lerp_(A.to(state["A"].dtype), share)
    state["G"].lerp_(G.to(state["G"].dtype), share)
