"""The curvature itself: one Kronecker-factored block for each layer of a model, at its current parameters.

A block approximates the curvature of the loss in the layer's matrix [W b], ([B,] out, in [+ 1]), in two ways:

    K-FAC    kron(G, A) = Q diag(g ⊗ a) Qᵀ          Q = Q_G ⊗ Q_A, from the eigendecompositions of G and A
    EKFAC    Q diag(s) Qᵀ                           s = R Σ_n (Q_Gᵀ V_n Q_A)², with V_n datum n's gradient

EKFAC keeps the basis and corrects the eigenvalues: of all matrices with this basis it is the nearest to the exact one.
Both forms have the same methods. The B blocks of a grouped layer are independent: its dense block is block diagonal.

Sources: Martens and Grosse (2015), arXiv:1503.05671; George et al. (2018), arXiv:1806.03884 (EKFAC).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.batch import Batch, Fisher
from natgrad.capture import Capture
from natgrad.factors import resolve_sharing
from natgrad.inverses import apply, eigh, reciprocal, scale_in_basis
from natgrad.layers import Bases, Layer, Sharing, partition, statistics_left_alone, unwrap
from natgrad.losses import Declared, resolve
from natgrad.options import check_fisher, module_of
from natgrad.torch_internals import forward_hooks


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
    bases: Bases
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
            return scale_in_basis(self.bases, V, self.spectrum)
        return apply(self.A, apply(self.G, V).mT).mT

    def solve(self, V: Tensor, damping: float = 0.0) -> Tensor:
        """The inverse of the block plus ``damping`` I, times V; undamped null directions are left out."""
        return scale_in_basis(self.bases, V, reciprocal(self.spectrum + damping))

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


def curvature(
    model: nn.Module,
    x: Any,
    y: Any = None,
    loss: Declared = None,
    *,
    fisher: Fisher = "mc",
    mc_samples: int = 1,
    sharing: Sharing | dict[str, Sharing] = "expand",
    ekfac: bool = False,
    output: Callable[[Any], Any] | None = None,
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
        ValueError: as :class:`~natgrad.Preconditioner`; and with ``ekfac`` for an ``x`` that can be gone through only
            once, such as a generator.

    Example:
        >>> import natgrad
        >>> model = nn.Linear(3, 2)
        >>> blocks = natgrad.curvature(model, torch.randn(8, 3), torch.randn(8, 2), "mse", fisher="exact")
        >>> blocks[""].dense().shape
        torch.Size([8, 8])
    """
    model = unwrap(module_of(model))
    parts = partition(model)
    layers = parts.require_layers()
    meaning = resolve(loss)
    check_fisher(fisher, meaning.likelihood)
    capture = Capture(
        model,
        layers,
        meaning,
        fisher=fisher,
        mc_samples=mc_samples,
        batch_fraction=1.0,
        sharing=resolve_sharing(sharing, [layer.name for layer in layers]),
        output=output,
        seed=seed,
    )
    batches = [(x, y)] if y is not None or isinstance(x, Tensor) else x
    if ekfac and isinstance(batches, Iterator):
        raise ValueError("`ekfac=True` goes through `x` twice: pass a list or a data loader, and no iterator.")
    try:
        batch = _pass(capture, model, progress(batches))
        blocks: dict[str, Block] = {}
        for layer in layers:
            factors = batch.factors(layer)
            if factors is not None:
                blocks[layer.name] = Block.of(layer, *factors)
        if ekfac:
            known = blocks
            capture.step, capture.bases = 0, lambda layer: known[layer.name].bases  # the same draws again
            batch = _pass(capture, model, progress(batches))
            spectra = {name: batch.spectrum(block.layer) for name, block in blocks.items()}
            blocks = {n: b if (s := spectra[n]) is None else b.corrected(s) for n, b in blocks.items()}
    finally:
        capture.close()
    return blocks


@contextmanager
def unobserved(model: nn.Module, by: Capture | None = None) -> Iterator[None]:
    """Passes of the model in here enter no step of an optimizer that watches it, nor its running statistics.

    Args:
        model: The module.
        by: Who looks at them all the same.
    """
    hooks = (hook for module in model.modules() for hook in forward_hooks(module, before=True).values())
    others = {id(owner): owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), Capture)}
    with ExitStack() as stack:
        stack.enter_context(statistics_left_alone(model))
        for owner in others.values():
            if owner is not by:
                stack.enter_context(owner.aside())
        yield


def _pass(capture: Capture, model: nn.Module, batches: Iterable[Any]) -> Batch:
    """Send every batch through the model, and through the loss where that is needed; returns what was captured."""
    is_empirical, total = capture.fisher == "empirical", capture.take()
    needs_loss = capture.loss.module is not None or is_empirical
    with unobserved(model, by=capture):
        for x, y in batches:
            with torch.enable_grad():
                output = capture.view(model(x))
                if needs_loss:
                    value = capture.loss.value(output, y)
                    parameters = [p for p in model.parameters() if p.requires_grad]
                    torch.autograd.grad(value, parameters, allow_unused=True)  # the hooks fire, `.grad` stays as it is
            capture.step += 1
            batch = capture.take()  # one by one, as there are no gradients to tell that they belong together
            if is_empirical:
                batch.weigh(batch.R**-2)  # the user's gradients carry the R of their own batch
            batch.follow(total)
            total = batch
    if is_empirical and total.terms:
        total.weigh(total.R**2)  # and are to carry that of all data
    return total
