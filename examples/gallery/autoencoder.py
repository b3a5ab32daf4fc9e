"""
The autoencoder
===============

The article's deep autoencoder, at a quarter of its width: eight sigmoid layers, a code of 49 numbers, full batches.
Adam settles on a blurred mean digit and takes thousands of steps to leave it. K-FAC is through in twenty. Both have
the same processor time.
"""

import time

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import natgrad
from natgrad.experiments.autoencoder import Problem, half_squared_error, network
from natgrad.experiments.settings import Settings

SECONDS = 12.0
problem = Problem(Settings(width_divisor=4, images=1_000))

# %%
# The loss is half the squared error, summed over pixels and averaged over images. torch has no name for it, so
# natgrad is given the likelihood: a Gaussian whose reduction is ``"batchmean"``. Nothing else is set. Adam's rate is
# the article's.

loss = natgrad.likelihoods.Gaussian(reduction="batchmean")


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[float, float]]:
    """(processor seconds, test loss) after each step."""
    curve, used = [(0.0, problem.test_loss(model))], 0.0
    while used < SECONDS:
        start = time.process_time()
        optimizer.zero_grad()
        half_squared_error(model(problem.train), problem.train).backward()
        optimizer.step()
        used += time.process_time() - start
        curve.append((used, problem.test_loss(model)))
    return curve


models = {"Adam": network(problem.settings), "natgrad.KFAC": network(problem.settings)}
curves = {
    "Adam": train(models["Adam"], torch.optim.Adam(models["Adam"].parameters(), lr=1e-3)),
    "natgrad.KFAC": train(models["natgrad.KFAC"], natgrad.KFAC(models["natgrad.KFAC"], loss)),
}
for name, curve in curves.items():
    print(f"{name}: {len(curve) - 1} steps, least test loss {min(value for _, value in curve):.2f}")

# %%
# The test loss, and what each makes of ten digits that it was not trained on.


def strip(images: Tensor) -> Tensor:
    """(10, 784) → (28, 280)."""
    return images.detach().reshape(10, 28, 28).transpose(0, 1).reshape(28, 280)


figure, rows = plt.subplots(4, 1, figsize=(8, 7.5), height_ratios=[6, 1, 1, 1], layout="constrained")
colours = {"Adam": "#0072B2", "natgrad.KFAC": "#D55E00"}
for name, curve in curves.items():
    rows[0].plot(*zip(*curve, strict=True), color=colours[name], label=name, linewidth=2)
rows[0].set(yscale="log", xlabel="processor seconds", ylabel="test loss", title="Adam waits, K-FAC walks")
rows[0].set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
rows[0].legend(frameon=False)
rows[0].spines[["top", "right"]].set_visible(False)
pictures = {"originals": problem.digits, **{name: model(problem.digits) for name, model in models.items()}}
for axes, (name, images) in zip(rows[1:], pictures.items(), strict=True):
    axes.imshow(strip(images), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_ylabel(name, rotation=0, ha="right", va="center")
plt.show()

best = {name: min(value for _, value in curve) for name, curve in curves.items()}
assert best["natgrad.KFAC"] < 0.6 * best["Adam"], best
