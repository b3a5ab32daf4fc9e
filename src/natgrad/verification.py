"""Is the curvature right on this network? Each layer's blocks beside the exact one, computed by brute force.

The exact block of a layer is R Σ_n J_nᵀ (∇²c) J_n, with J_n the Jacobian of datum n's output in the layer's parameters,
one backward pass a row and none of natgrad's hooks. Where that would take too long or not fit, it is sampled, and the
report says so: of too many data, some; of too large a layer, the products of the block with random vectors,

    relative error ≈ √( Σ_k ‖(B̂ − B) v_k‖² / Σ_k ‖B v_k‖² ),    v_k standard normal.

Source: Martens (2020), arXiv:1412.1193, of the generalized Gauss-Newton matrix.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from natgrad.blocks import Block, curvature, unobserved
from natgrad.derivatives import directional_derivative
from natgrad.layers import Layer, Sharing, at_least_float32, unwrap
from natgrad.losses import Declared, Loss, Weights, resolve
from natgrad.options import module_of
from natgrad.outputs import View
from natgrad.report import format_table
from natgrad.rerun import rerun

# A layer with more parameters is sampled: its block alone takes 16 MB in float32 at this size. So is a batch with more
# output entries, each of which takes a backward pass.
MAX_PARAMETERS, MAX_OUTPUTS, PROBES = 2048, 4096, 16
# Verdicts, by the relative error of a block.
EXACT, CLOSE = 1e-5, 0.5


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: Of the layer.
        parameters: Number of entries of its matrix.
        kfac: Relative error of the K-FAC block, in the Frobenius norm.
        ekfac: The same with EKFAC's eigenvalues.
        cosine: Between the gradient preconditioned by K-FAC and by the exact block, both damped; NaN where sampled.
        sampled: Whether the errors come from random products.
    """

    name: str
    parameters: int
    kfac: float
    ekfac: float
    cosine: float
    sampled: bool

    @property
    def verdict(self) -> Literal["exact", "close", "rough"]:
        """``"exact"`` up to rounding, ``"close"`` where the error is below a half, ``"rough"`` beyond."""
        return "exact" if self.kfac < EXACT else "close" if self.kfac < CLOSE else "rough"


@dataclass(frozen=True)
class Verification:
    """The report of :func:`verify`; prints as a table."""

    layers: list[LayerReport]
    notes: list[str]

    def __str__(self) -> str:
        header = ("layer", "parameters", "K-FAC error", "EKFAC error", "cosine", "verdict")
        rows = [
            (
                layer.name,
                f"{layer.parameters:,}",
                f"{layer.kfac:.1e}{'*' * layer.sampled}",
                f"{layer.ekfac:.1e}{'*' * layer.sampled}",
                "" if layer.sampled else f"{layer.cosine:.4f}",
                layer.verdict,
            )
            for layer in self.layers
        ]
        legend = "errors relative to the exact block; cosine of the natural gradients by K-FAC and by it, both damped"
        return "\n".join([format_table([header, *rows], right_aligned={1, 2, 3, 4}), legend, *self.notes])


def verify(
    model: nn.Module,
    x: Any,
    y: Any,
    loss: Declared,
    *,
    sharing: Sharing | dict[str, Sharing] = "expand",
    damping: float = 1e-3,
    output: Callable[[Any], Any] | None = None,
    max_parameters: int = MAX_PARAMETERS,
    max_outputs: int = MAX_OUTPUTS,
    seed: int = 0,
) -> Verification:
    """Compare the K-FAC and EKFAC blocks of every layer with the exact generalized Gauss-Newton block.

    Args:
        model: The model. Put it into ``eval`` mode if its dropout is not meant.
        x: A batch of inputs, data first.
        y: Its targets; of several outputs, by the keys of the losses.
        loss: As for :class:`~natgrad.Preconditioner`: names, or torch loss modules.
        sharing: As there.
        damping: Of both blocks, relative to the mean eigenvalue of the exact one, where preconditioned gradients are
            compared.
        output: As there.
        max_parameters: Larger layers are compared by random products.
        max_outputs: Of a batch with more output entries than this, only the first data are used.
        seed: Of the random products.

    Returns:
        A report, with a table as its string. Float64 models show exactness down to rounding.

    Raises:
        ValueError: as :class:`~natgrad.Preconditioner`.

    Example:
        >>> import natgrad
        >>> model = nn.Linear(3, 2).double()
        >>> x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
        >>> natgrad.verify(model, x, y, "mse").layers[0].verdict
        'exact'
    """
    model, meaning = unwrap(module_of(model)), resolve(loss)
    view = View(output, meaning)
    with unobserved(model):
        x, y, notes = _restrict(model, x, y, view, max_outputs)
        options: dict[str, Any] = {"fisher": "exact", "sharing": sharing, "output": output}
        kfac = curvature(model, x, y, loss, **options)
        ekfac = curvature(model, x, y, loss, **options, ekfac=True)
        truth = Truth(model, meaning, x, y, view)
        layers = {name: block.layer for name, block in kfac.items()}
        small = [layer for layer in layers.values() if kfac[layer.name].spectrum.numel() <= max_parameters]
        dense = truth.dense(small)
        generator = torch.Generator().manual_seed(seed)
        reports = []
        for name, layer in layers.items():
            blocks = kfac[name], ekfac[name]
            if name in dense:
                reports.append(_compare(blocks, dense[name], truth.gradient(layer), damping))
            else:
                reports.append(_compare_by_products(blocks, truth, generator))
        if len(small) < len(layers):
            notes.append(f"* of a layer with more than {max_parameters:,} parameters: from {PROBES} random products.")
        return Verification(reports, notes)


def _restrict(model: nn.Module, x: Any, y: Any, view: View, max_outputs: int) -> tuple[Any, Any, list[str]]:
    """As many of the first data as have no more than ``max_outputs`` output entries."""
    with torch.no_grad():
        output = view(model(x))
    entries = output.numel()
    lengths = {len(leaf) for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.ndim}
    # Rows of the output may be several for each datum.
    data = max((length for length in lengths if length and len(output) % length == 0), default=0)
    if entries <= max_outputs or not data:
        return x, y, []
    kept = max(1, data * max_outputs // entries)
    note = f"The first {kept} of {data} data were used, as all of them have {entries:,} output entries."

    def first(leaf: Any) -> Any:
        is_of_data = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) > 0 and len(leaf) % data == 0
        return leaf[: kept * (len(leaf) // data)] if is_of_data else leaf

    return tree_map(first, x), tree_map(first, y), [note]


class Truth:
    """The exact block of each layer, without natgrad's hooks.

    Args:
        model: The model.
        loss: A loss whose value is known.
        x: Inputs.
        y: Targets.
        select: From the model's return value to the tensor that the loss sees.
    """

    def __init__(self, model: nn.Module, loss: Loss, x: Any, y: Any, select: Callable[[Any], Tensor]) -> None:
        self.model, self.loss, self.x, self.select = model, loss, x, select
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        with torch.enable_grad():
            self.output = select(model(x))
            value = loss.value(self.output, y)
        self.at = at_least_float32(self.output.detach())
        parameters = list(self.names)
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        self.gradients = dict(zip(parameters, grads, strict=True))
        self.weights: Weights | None = None
        if loss.weigh is not None and loss.module is not None:
            self.weights = loss.weigh(loss.module, self.at, (y,))
        assert loss.likelihood is not None
        self.likelihood = loss.likelihood
        mean = self.weights is not None and self.likelihood.reduction == "mean"
        terms = float(self.weights.terms.sum()) if mean and self.weights else self.likelihood.terms(self.at)
        self.scale = self.likelihood.scale(terms)

    def gradient(self, layer: Layer) -> Tensor:
        """Of the loss, as the layer's matrix."""
        return layer.to_matrix([self._or_zero(self.gradients[p], p) for p in layer.parameters])

    def dense(self, layers: list[Layer]) -> dict[str, Tensor]:
        """R Σ_n J_nᵀ (∇²c) J_n, over the row-major entries of each layer's matrix."""
        blocks: dict[str, Tensor] = {}
        for n in range(len(self.at)) if layers else ():
            for layer, J in zip(layers, self._jacobians(layers, n), strict=True):
                HJ = self._hessian(J.T.unflatten(1, self.at[n : n + 1].shape), slice(n, n + 1)).flatten(1).T
                block = self.scale * J.T @ HJ
                blocks[layer.name] = block if layer.name not in blocks else blocks[layer.name] + block
        return blocks

    def product(self, layer: Layer, V: Tensor) -> Tensor:
        """The layer's block times V, ([B,] out, in [+ 1])."""
        parameters = {self.names[p]: p.detach() for p in layer.parameters}
        step = {self.names[p]: d.contiguous() for p, d in zip(layer.parameters, layer.from_matrix(V), strict=True)}

        def output(moving: dict[str, Tensor]) -> tuple[Tensor]:
            return (self.select(rerun(self.model, moving, (self.x,), {})),)

        _, (Jv,) = directional_derivative(output, parameters, step)
        HJv = self.scale * self._hessian(Jv.unsqueeze(0), slice(None)).squeeze(0)
        grads = torch.autograd.grad(self.output, layer.parameters, HJv.to(self.output), retain_graph=True)
        return layer.to_matrix(grads)

    def _jacobians(self, layers: list[Layer], n: int) -> list[Tensor]:
        """Of datum n's output entries in each layer's matrix: (entries, parameters of the layer)."""
        parameters = [p for layer in layers for p in layer.parameters]
        rows: list[list[Tensor]] = [[] for _ in layers]
        for entry in self.output[n].flatten():
            grads = iter(torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True))
            for row, layer in zip(rows, layers, strict=True):
                own = [self._or_zero(next(grads), p) for p in layer.parameters]
                row.append(at_least_float32(layer.to_matrix(own)).flatten())
        return [torch.stack(row) for row in rows]

    def _hessian(self, vectors: Tensor, data: slice) -> Tensor:
        """∇²c, with the weights of the targets, times each of the vectors (k, *output of these data)."""
        at = self.at[data]
        product = torch.vmap(lambda v: self.likelihood.hessian_product(at, v))(at_least_float32(vectors))
        return product if self.weights is None else product * self.weights.curvature[data]

    @staticmethod
    def _or_zero(gradient: Tensor | None, parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter) if gradient is None else gradient


def _compare(blocks: tuple[Block, Block], exact: Tensor, gradient: Tensor, damping: float) -> LayerReport:
    size = float(exact.norm())
    errors = [float((block.dense() - exact).norm()) / size if size else math.nan for block in blocks]
    delta = damping * float(exact.diagonal().mean())
    unit = torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
    gradient = gradient.to(exact.dtype)
    best = torch.linalg.lstsq(exact + delta * unit, gradient.flatten().unsqueeze(1)).solution.squeeze(1)
    cosine = nn.functional.cosine_similarity(best, blocks[0].solve(gradient, delta).flatten(), dim=0)
    return LayerReport(blocks[0].layer.name, len(exact), errors[0], errors[1], float(cosine), sampled=False)


def _compare_by_products(blocks: tuple[Block, Block], truth: Truth, generator: torch.Generator) -> LayerReport:
    spectrum = blocks[0].spectrum
    size, squared = 0.0, [0.0, 0.0]
    for _ in range(PROBES):
        V = torch.randn(spectrum.shape, generator=generator, dtype=spectrum.dtype).to(spectrum.device)
        exact = truth.product(blocks[0].layer, V).to(V.dtype)
        size += float(exact.square().sum())
        for i, block in enumerate(blocks):
            squared[i] += float((block.matvec(V) - exact).square().sum())
    errors = [math.sqrt(e / size) if size else math.nan for e in squared]
    return LayerReport(blocks[0].layer.name, spectrum.numel(), errors[0], errors[1], math.nan, sampled=True)
