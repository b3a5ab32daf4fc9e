"""
Laplace approximation
=====================

A classifier trained to a low loss is sure of itself everywhere, also far from any datum. Its curvature knows better:
the posterior of the weights is about a Gaussian around the trained ones, with the inverse of N times the loss's
curvature plus the prior's for its covariance. :func:`natgrad.curvature` gives that, layer by layer.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import natgrad

torch.manual_seed(0)
N, PRIOR = 600, 0.3


def spirals() -> tuple[Tensor, Tensor]:
    """Three arms in the plane: (N, 2) and their numbers (N,)."""
    y = torch.arange(N) % 3
    radius = 0.3 + 1.7 * torch.rand(N)
    angle = 1.6 * radius + y * 2 * math.pi / 3 + 0.3 * torch.randn(N)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1), y


x, y = spirals()
model = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))
adam = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(800):  # the posterior's maximum: the loss and the prior
    adam.zero_grad()
    prior = PRIOR / N / 2 * sum(p.square().sum() for p in model.parameters())
    (cross_entropy(model(x), y) + prior).backward()
    adam.step()
accuracy = (model(x).argmax(dim=1) == y).float().mean().item()
print(f"training accuracy {accuracy:.1%}")

# %%
# The loss is a mean, so the log posterior's curvature is N times the block, plus the prior's precision. The variance
# of the outputs at a point is J (N F + τ I)⁻¹ Jᵀ, and ``block.solve`` does the inverse.

blocks = natgrad.curvature(model, x, y, "cross_entropy", fisher="exact")
parameters = {name: p.detach() for name, p in model.named_parameters()}


def outputs(moved: dict[str, Tensor], point: Tensor) -> Tensor:
    """The three logits at one point."""
    logits: Tensor = torch.func.functional_call(model, moved, (point,))
    return logits


def predict(points: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities with the trained weights alone, and averaged over the posterior: (points, 3) each."""
    J = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(parameters, points)
    variance = torch.zeros(len(points), 3)
    for name, block in blocks.items():
        matrix = torch.cat([J[f"{name}.weight"], J[f"{name}.bias"][..., None]], dim=-1)  # (points, 3, out, in + 1)
        variance += (matrix * block.solve(matrix, PRIOR / N) / N).sum((-1, -2))
    logits = model(points).detach()
    draws = logits + variance.sqrt() * torch.randn(500, 1, 3)  # the same draws at all points, for a smooth picture
    return logits.softmax(dim=1), draws.softmax(dim=-1).mean(dim=0)


# %%
# Confidence over the plane: white is sure. The trained weights alone are sure almost everywhere; the average over the
# posterior is sure near the data.

side = torch.linspace(-4, 4, 90)
plane = torch.cartesian_prod(side, side)
alone, averaged = predict(plane)
corners = plane.norm(dim=1) > 4
confidence = {"trained weights alone": alone.amax(1), "averaged over the posterior": averaged.amax(1)}
figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained", sharey=True)
for axes, (title, values) in zip(panels, confidence.items(), strict=True):
    image = axes.contourf(side, side, values.reshape(90, 90).T, levels=torch.linspace(1 / 3, 1, 13), cmap="bone")
    axes.scatter(*x.T, c=[("#0072B2", "#D55E00", "#009E73")[k] for k in y], s=9, edgecolors="white", linewidths=0.3)
    axes.set(
        title=f"{title}\nconfidence beyond radius 4: {values[corners].mean():.2f}", aspect="equal", xticks=[], yticks=[]
    )
figure.colorbar(image, ax=panels, label="largest probability", ticks=[0.4, 0.6, 0.8, 1.0], shrink=0.9)
plt.show()

near = predict(x)[1]
assert (near.argmax(dim=1) == y).float().mean() > accuracy - 0.02
assert alone.amax(1)[corners].mean() > averaged.amax(1)[corners].mean() + 0.1
assert near.amax(1).mean() > averaged.amax(1)[corners].mean() + 0.04
