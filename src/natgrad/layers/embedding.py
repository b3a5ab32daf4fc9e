"""``nn.Embedding``: a linear layer of one-hot inputs, whose A is the diagonal of token frequencies.

The matrix is the transposed table, (dim, tokens). No one-hot vector is built. Tokens equal to ``padding_idx`` are not
trained, and count neither for A nor for G. A is diagonal with ``sharing="expand"``; with ``"reduce"`` its off-diagonal
entries, how often two tokens meet in a datum, are left out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from natgrad.layers.base import WeightLayer, register
from natgrad.layers.moments import Moment, Sharing, at_least_float32
from natgrad.layers.spectrum import Bases, rotate_rows, times


@register(nn.Embedding)
class EmbeddingLayer(WeightLayer):
    """z = W[token] with tokens of shape (N, …)."""

    module: nn.Embedding

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Options that change the table or its gradient on the way."""
        for option in ("sparse", "max_norm", "scale_grad_by_freq"):
            if getattr(module, option):
                return f"{option} changes the table or its gradient"
        return None

    def inputs(self, x: Tensor) -> Tensor:
        """Tokens as they are, (N, S, 1): ``input_moment`` counts them."""
        return x.reshape(x.shape[0] if x.ndim else 1, -1, 1)

    def gradients(self, g: Tensor, x: Tensor) -> Tensor:
        """(N, …, dim) → (N, S, dim), zero where the token is padding."""
        rows = g.reshape(g.shape[0] if g.ndim > 1 else 1, -1, g.shape[-1])
        return rows * self._counted(self.inputs(x))

    def _counted(self, tokens: Tensor) -> Tensor:
        padding = self.module.padding_idx
        return torch.ones_like(tokens, dtype=torch.bool) if padding is None else tokens != padding

    def input_moment(self, rows: Tensor, sharing: Sharing) -> Moment:
        """Token counts."""
        tokens = rows.squeeze(-1)
        counted = self._counted(tokens)
        n, size = tokens.shape[0], self.module.num_embeddings
        dtype = torch.promote_types(self.module.weight.dtype, torch.float32)
        if sharing == "reduce":
            key = tokens + size * torch.arange(n, device=tokens.device).unsqueeze(1)
            keys, times = key[counted].unique(return_counts=True)
            total = torch.zeros(size, dtype=dtype, device=tokens.device)
            total.index_add_(0, keys % size, times.to(dtype).square())
            return Moment(total.unsqueeze(-1), float(counted.sum(1).square().sum()), n)
        kept = tokens[counted]
        total = torch.bincount(kept, minlength=size).to(dtype)
        return Moment(total.unsqueeze(-1), float(kept.numel()), kept.numel())

    def squared_gradients(self, x: Tensor, g: Tensor, bases: Bases) -> Tensor:
        """The basis of A is the identity: a column is the sum over data of squared sums over a token's positions."""
        tokens, columns = self._columns(x, g)
        squares = rotate_rows(columns[None], bases[1]).squeeze(0).square()
        return squares.new_zeros(self.module.num_embeddings, g.shape[-1]).index_add_(0, tokens, squares).mT

    def squared_length(self, x: Tensor, g: Tensor, metrics: Bases) -> Tensor:
        """The metric of A is diagonal."""
        tokens, columns = self._columns(x, g)
        return torch.sum(metrics[0][tokens] * columns * times(columns[None], metrics[1]).squeeze(0))

    def _columns(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The columns that are not zero of each datum's gradient, (n, dim), and the token that each belongs to."""
        g = at_least_float32(g).flatten(0, 1)  # zero where the token is padding
        size = self.module.num_embeddings
        keys = x.squeeze(-1) + size * torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        distinct, place = keys.flatten().unique(return_inverse=True)
        return distinct % size, g.new_zeros(len(distinct), g.shape[-1]).index_add_(0, place, g)

    def to_matrix(self, gradients: Sequence[Tensor]) -> Tensor:
        """(dim, tokens)."""
        return gradients[0].mT

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """(tokens, dim)."""
        return [matrix.mT]

    @property
    def shape(self) -> tuple[int, int]:
        """(dim, tokens)."""
        return self.module.embedding_dim, self.module.num_embeddings

    @property
    def diagonal(self) -> tuple[bool, bool]:
        """A is diagonal whatever its size."""
        return super().diagonal[0], True
