"""Deep linear regression, ill-conditioned, where the answer is known: undo a mixing.

Inputs are x = M z with z standard normal, M = R₁ diag(s) R₂, R₁ and R₂ random rotations and s falling geometrically
from 1 to 1/condition; targets are z itself, so M⁻¹ solves it exactly and the least loss is zero. Each of the directions
holds the same share of the loss, however faintly it enters x. The loss over the whole distribution has a closed form:
with P the product of the network's weights, the mean over outputs of E (Px − z)² is ‖P M − I‖² / dimension.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad.experiments.bench.workload import Batch, Workload, evaluating, seeded


def linear(
    name: str, seconds: float, dimension: int = 64, depth: int = 4, condition: float = 1e3, batch: int = 500
) -> Workload:
    """A chain of bias-free linear layers of equal widths, initially orthogonal; fresh data at every step."""
    mixing = mixing_matrix(dimension, condition)

    def build() -> nn.Module:
        layers = [nn.Linear(dimension, dimension, bias=False) for _ in range(depth)]
        for layer in layers:
            nn.init.orthogonal_(layer.weight)
        return nn.Sequential(*layers)

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            z = torch.randn(batch, dimension, generator=generator)
            yield z @ mixing.T, z

    def evaluate(model: nn.Module) -> dict[str, float]:
        # The columns of M as inputs: the rows of what comes out are those of (P M)ᵀ.
        return {"loss": (model(mixing.T) - torch.eye(dimension)).square().sum().item() / dimension}

    return Workload(
        name=name,
        title=f"deep linear regression, {depth} layers of {dimension}, condition {condition:g}, batch {batch}",
        model=seeded(build),
        batches=batches,
        loss=functional.mse_loss,
        natgrad_loss="mse",
        evaluate=evaluating(evaluate),
        seconds=seconds,
    )


def mixing_matrix(dimension: int, condition: float) -> Tensor:
    """M, (dimension, dimension); always the same."""
    generator = torch.Generator().manual_seed(0)
    drawn: Tensor = torch.randn(2, dimension, dimension, generator=generator)
    left, right = torch.linalg.qr(drawn).Q
    scales = torch.logspace(0, -math.log10(condition), dimension)
    mixing: Tensor = (left * scales) @ right
    return mixing
