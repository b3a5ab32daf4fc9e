"""The curvature itself: one Kronecker-factored block for each layer of a model, at its current parameters.

A block approximates the curvature of the loss in the layer's matrix [W b], ([B,] out, in [+ 1]), in two ways:

    K-FAC    kron(G, A) = Q diag(g ⊗ a) Qᵀ          Q = Q_G ⊗ Q_A, from the eigendecompositions of G and A
    EKFAC    Q diag(s) Qᵀ                           s = R Σ_n (Q_Gᵀ V_n Q_A)², with V_n datum n's gradient

EKFAC keeps the basis and corrects the eigenvalues: of all matrices with this basis it is the nearest to the exact one.
Both forms have the same methods. The B blocks of a grouped layer are independent: its dense block is block diagonal.

Sources: Martens and Grosse (2015), arXiv:1503.05671; George et al. (2018), arXiv:1806.03884 (EKFAC).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.batch import Batch, Call, Fisher
from natgrad.capture import Capture, check_fisher
from natgrad.factors import resolve_sharing
from natgrad.inverses import apply, eigh
from natgrad.layers import Layer, Sharing, at_least_float32, partition
from natgrad.likelihoods import Likelihood
from natgrad.losses import resolve

# Per-datum gradients are built for so many entries at a time.
CHUNK = 2**24


@dataclass(frozen=True)
class Block:
    """The curvature of one layer's matrix [W b], ([B,] out, in [+ 1]).

    Attributes:
        layer: The layer; its ``to_matrix`` and ``from_matrix`` translate between parameters and matrix.
        A: ([B,] in [+ 1], in [+ 1]), or a column if kept as a diagonal.
        G: ([B,] out, out), or a column.
        bases: Eigenvectors of A and of G.
        spectrum: Eigenvalues in this basis, ([B,] out, in [+ 1]): the products of those of G and A, or EKFAC's.
        ekfac: Whether the eigenvalues are EKFAC's.
    """

    layer: Layer
    A: Tensor
    G: Tensor
    bases: tuple[Tensor, Tensor]
    spectrum: Tensor
    ekfac: bool = False

    @classmethod
    def of(cls, layer: Layer, A: Tensor, G: Tensor) -> "Block":
        """The K-FAC block of the factors."""
        (a, Q_A), (g, Q_G) = eigh(A), eigh(G)
        spectrum = g.clamp(min=0).unsqueeze(-1) * a.clamp(min=0).unsqueeze(-2)
        return cls(layer, A, G, (Q_A, Q_G), spectrum)

    @property
    def eigenvalues(self) -> Tensor:
        """All eigenvalues, in ascending order."""
        return self.spectrum.flatten().sort().values

    def matvec(self, V: Tensor) -> Tensor:
        """The block times V, both ([B,] out, in [+ 1])."""
        if self.ekfac:
            return self._in_basis(V, lambda rotated: rotated * self.spectrum)
        return apply(self.A, apply(self.G, V).mT).mT

    def solve(self, V: Tensor, damping: float = 0.0) -> Tensor:
        """The inverse of the block plus ``damping`` I, times V; undamped null directions are left out."""
        shifted = self.spectrum + damping
        floor = torch.finfo(shifted.dtype).eps * shifted.max()
        scale = torch.where(shifted > floor, shifted, torch.inf).reciprocal()
        return self._in_basis(V, lambda rotated: rotated * scale)

    def trace(self) -> Tensor:
        """Sum of the eigenvalues."""
        return self.spectrum.sum()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Logarithm of the determinant of the block plus ``damping`` I; −∞ if that is singular."""
        return (self.spectrum + damping).log().sum()

    def dense(self) -> Tensor:
        """The block over the row-major entries of the matrix, for small layers."""
        size = self.spectrum.numel()
        unit = torch.eye(size, dtype=self.spectrum.dtype, device=self.spectrum.device)
        return torch.stack([self.matvec(e.reshape(self.spectrum.shape)).flatten() for e in unit], dim=1)

    def corrected(self, spectrum: Tensor) -> "Block":
        """The same basis with EKFAC's eigenvalues."""
        return Block(self.layer, self.A, self.G, self.bases, spectrum, ekfac=True)

    def rotate(self, V: Tensor) -> Tensor:
        """Q_Gᵀ V Q_A."""
        Q_A, Q_G = self.bases
        return apply(_transposed(Q_A), apply(_transposed(Q_G), V).mT).mT

    def _in_basis(self, V: Tensor, scale: Callable[[Tensor], Tensor]) -> Tensor:
        Q_A, Q_G = self.bases
        return apply(Q_A, apply(Q_G, scale(self.rotate(V))).mT).mT


def curvature(
    model: nn.Module,
    x: Any,
    y: Tensor | None = None,
    loss: str | nn.Module | Likelihood | None = None,
    *,
    fisher: Fisher = "mc",
    mc_samples: int = 1,
    sharing: Sharing | dict[str, Sharing] = "expand",
    ekfac: bool = False,
    output: Callable[[Any], Tensor] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    seed: int = 0,
) -> dict[str, Block]:
    """The curvature block of every layer, at the model's current parameters; ``.grad`` is left alone.

    Args:
        model: The model, in the mode (``train`` or ``eval``) that is meant.
        x: One batch of inputs; or, without ``y``, an iterable of pairs (inputs, targets) such as a data loader.
        y: The targets of the batch.
        loss: As for :class:`~natgrad.Preconditioner`.
        fisher: As there.
        mc_samples: As there.
        sharing: As there.
        ekfac: Correct the eigenvalues, in a second pass over the data.
        output: As there.
        progress: Wraps the iterable of batches, for instance ``rich.progress.track`` or ``tqdm.tqdm``.
        seed: Of the samples for ``"mc"``.

    Returns:
        Blocks by layer name. Over several batches the loss is that of all data together: for a mean, their mean.

    Raises:
        ValueError: as :class:`~natgrad.Preconditioner`.

    Example:
        >>> import natgrad
        >>> model = nn.Linear(3, 2)
        >>> blocks = natgrad.curvature(model, torch.randn(8, 3), torch.randn(8, 2), "mse", fisher="exact")
        >>> blocks[""].dense().shape
        torch.Size([8, 8])
    """
    parts = partition(model)
    parts.require_layers()
    meaning = resolve(loss)
    check_fisher(fisher, meaning.likelihood)
    capture = Capture(
        model,
        parts.layers,
        meaning,
        fisher=fisher,
        mc_samples=mc_samples,
        batch_fraction=1.0,
        sharing=resolve_sharing(sharing, [layer.name for layer in parts.layers]),
        output=output,
        seed=seed,
    )
    batches = [(x, y)] if y is not None or isinstance(x, Tensor) else x
    try:
        batch = _pass(capture, model, progress(batches))
        scale = batch.scale()
        blocks: dict[str, Block] = {}
        for layer in parts.layers:
            factors = batch.factors(layer)
            if factors is not None:
                blocks[layer.name] = Block.of(layer, *factors)
        if ekfac:
            correction = Correction(blocks)
            capture.step, capture.observer = 0, correction.add  # the same draws again
            _pass(capture, model, progress(batches))
            blocks = correction.blocks(scale)
    finally:
        capture.close()
    return blocks


class Correction:
    """Second moments of the data's gradients in the blocks' bases.

    Layers whose A is a diagonal, and tied layers, keep the eigenvalues of K-FAC.
    """

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        self.kfac = blocks
        self.sums: dict[str, Tensor] = {}

    def add(self, pairs: list[tuple[Call, Tensor]], weight: float) -> None:
        """Add what one backpropagated vector gave: calls of layers, and the gradients at their outputs."""
        by_layer: dict[str, list[tuple[Call, Tensor]]] = {}
        for call, g in pairs:
            if not call.owner.swaps(call.layer) and not call.layer.diagonal[1] and call.owner.name in self.kfac:
                by_layer.setdefault(call.owner.name, []).append((call, g))
        for name, calls in by_layer.items():
            block = self.kfac[name]
            sums = self.sums.setdefault(name, torch.zeros_like(block.spectrum))
            for part in {str(call.blocks): call.blocks for call, _ in calls}.values():
                own = [(call, g) for call, g in calls if call.blocks == part]
                sums[part] += weight * self._second_moment(block, own, part)

    def _second_moment(self, block: Block, calls: list[tuple[Call, Tensor]], part: slice) -> Tensor:
        """Σ_n (Q_Gᵀ V_n Q_A)², with V_n the sum over positions and calls of g xᵀ."""
        layer = calls[0][0].layer
        x = at_least_float32(torch.cat([layer.inputs(call.x) for call, _ in calls], dim=-2))
        g = at_least_float32(torch.cat([layer.gradients(g, call.x) for call, g in calls], dim=-2))
        if layer.has_bias:
            x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
        Q_A, Q_G = (Q if layer.blocks is None else Q[part] for Q in block.bases)
        # Leading dimension of blocks, if there is one, then data, positions, entries.
        x, g = _rotate_rows(x, Q_A), _rotate_rows(g, Q_G)
        n = x.shape[-3]
        chunk = max(1, CHUNK // (x.shape[-1] * g.shape[-1] * (layer.blocks or 1)))
        total = x.new_zeros(())
        for start in range(0, n, chunk):
            some = slice(start, start + chunk)
            V = torch.einsum("...nso,...nsi->...noi", g[..., some, :, :], x[..., some, :, :])
            total = total + V.square().sum(-3)
        return total

    def blocks(self, scale: float) -> dict[str, Block]:
        """The corrected blocks; ``scale`` is R, or 1/R for the empirical Fisher."""
        return {
            name: block.corrected(self.sums[name] * scale) if name in self.sums else block
            for name, block in self.kfac.items()
        }


def _pass(capture: Capture, model: nn.Module, batches: Iterable[Any]) -> Batch:
    """Send every batch through the model, and through the loss where that is needed; returns what was captured."""
    needs_loss = capture.loss.module is not None or capture.fisher == "empirical"
    for x, y in batches:
        with torch.enable_grad():
            output = capture.select(model(x))
            if needs_loss:
                value = capture.loss.value(output, y)
                parameters = [p for p in model.parameters() if p.requires_grad]
                torch.autograd.grad(value, parameters, allow_unused=True)  # the hooks fire, `.grad` stays as it is
        capture.step += 1
    return capture.take()


def _transposed(Q: Tensor) -> Tensor:
    return Q if Q.shape[-1] == 1 else Q.mT


def _rotate_rows(rows: Tensor, Q: Tensor) -> Tensor:
    """Rows ([B,] N, S, d) times Q, ([B,] d, d), or the identity if Q is a column."""
    return rows if Q.shape[-1] == 1 else rows @ Q.unsqueeze(-3)
