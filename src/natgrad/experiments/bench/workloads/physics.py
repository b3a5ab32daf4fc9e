"""A network that solves Poisson's equation, −Δu = f on the unit square with u = 0 on its boundary.

In the first-order form the network has three outputs, u and q = (q₁, q₂), and the loss is the mean square of

    q₁ − ∂u/∂x,   q₂ − ∂u/∂y,   ∂q₁/∂x + ∂q₂/∂y + f,   w u on the boundary,

with f = 2π² sin πx sin πy, so that u = sin πx sin πy is the solution. The derivatives are with respect to the *inputs*.
They are carried along with the values: every layer is called once, on the stack

    [value inside; ∂/∂x; ∂/∂y; value on the boundary]    (N, 4, width),

as four positions that share one weight. A tangent sees the weight and not the bias, and the nonlinearity multiplies it
by its slope at the value. So the bias is the weight of an input that is 1 for values and 0 for tangents, and what a
layer sees and what comes out is all that K-FAC needs: the model's output is the residuals, the loss is ``"mse"``.

Source of the stack: Dangel, Müller and Zeinhofer (2024), "Kronecker-factored approximate curvature for physics-informed
neural networks", arXiv:2405.15603, section 3.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad.experiments.bench.workload import Batch, Workload, evaluating, seeded

BOUNDARY_WEIGHT = 10.0
HELD_OUT, GRID = 2_000, 50


class Poisson(nn.Module):
    """Points (N, 4), one inside and one on the boundary, → residuals (N, 4) in the order of the module's docstring."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        widths = [2, *[width] * depth, 3]
        layers = [nn.Linear(a + 1, b, bias=False) for a, b in itertools.pairwise(widths)]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
        self.layers = nn.ModuleList(layers)

    def forward(self, points: Tensor) -> Tensor:
        """(N, 4) → (N, 4)."""
        along_x, along_y = points.new_tensor([[1.0, 0.0], [0.0, 1.0]]).expand(len(points), 2, 2).unbind(1)
        inside, boundary = points[:, :2], points[:, 2:]
        out = self._propagate(torch.stack([inside, along_x, along_y, boundary], dim=1))
        value, dx, dy, edge = out.unbind(1)  # each (N, 3): of u, q₁, q₂
        divergence = dx[:, 1] + dy[:, 2]
        return torch.stack(
            [value[:, 1] - dx[:, 0], value[:, 2] - dy[:, 0], divergence + source(inside), BOUNDARY_WEIGHT * edge[:, 0]],
            dim=1,
        )

    def values(self, points: Tensor) -> Tensor:
        """u, q₁, q₂ at points (N, 2): (N, 3)."""
        h = points
        for i, layer in enumerate(self.layers):
            h = layer(functional.pad(torch.tanh(h) if i else h, (0, 1), value=1.0))
        return h

    def _propagate(self, h: Tensor) -> Tensor:
        """A stack of values and tangents, (N, 4, 2) → (N, 4, 3)."""
        ones = h.new_tensor([1.0, 0.0, 0.0, 1.0]).reshape(4, 1).expand(len(h), 4, 1)
        for i, layer in enumerate(self.layers):
            if i:
                value, dx, dy, edge = h.unbind(1)
                value = torch.tanh(value)
                slope = 1 - value.square()
                h = torch.stack([value, slope * dx, slope * dy, torch.tanh(edge)], dim=1)
            h = layer(torch.cat([h, ones], dim=2))
        return h


def solution(points: Tensor) -> Tensor:
    """The exact u at points (N, 2): (N,)."""
    return torch.sin(math.pi * points).prod(dim=1)


def source(points: Tensor) -> Tensor:
    """f at points (N, 2): (N,)."""
    return 2 * math.pi**2 * solution(points)


def poisson(name: str, seconds: float, width: int = 64, depth: int = 4, batch: int = 1_000) -> Workload:
    """Fresh points at every step; ``error`` is that of u relative to the exact one, in the root mean square."""
    held_out = collocation(HELD_OUT, torch.Generator().manual_seed(0))
    axis = torch.linspace(0, 1, GRID)
    grid = torch.cartesian_prod(axis, axis)
    exact = solution(grid)

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield collocation(batch, generator), torch.zeros(batch, 4)

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Poisson)
        error = (model.values(grid)[:, 0] - exact).norm() / exact.norm()
        return {"loss": model(held_out).square().mean().item(), "error": error.item()}

    return Workload(
        name=name,
        title=f"Poisson's equation, first-order form, tanh MLP 2-{'-'.join([str(width)] * depth)}-3, {batch:,} points",
        model=seeded(lambda: Poisson(width, depth)),
        batches=batches,
        loss=functional.mse_loss,
        natgrad_loss="mse",
        evaluate=evaluating(evaluate),
        seconds=seconds,
    )


def collocation(count: int, generator: torch.Generator) -> Tensor:
    """Uniform inside, and uniform on the four sides: (count, 4)."""
    inside = torch.rand(count, 2, generator=generator)
    along = torch.rand(count, generator=generator)
    side = torch.randint(4, (count,), generator=generator)
    across = (side % 2).float()
    boundary = torch.where((side < 2)[:, None], torch.stack([along, across], 1), torch.stack([across, along], 1))
    return torch.cat([inside, boundary], dim=1)
