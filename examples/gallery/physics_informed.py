r"""
A physics-informed network, to high accuracy
============================================

A network that solves Poisson's equation :math:`-\Delta u = f` on the unit square learns from the equation's
residuals, not from data. There is no noise to average out, only bad conditioning, and first-order methods crawl at
errors of several per cent. K-FAC goes on.
"""

import time

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import mse_loss

import natgrad
from natgrad.experiments.bench.workloads.physics import Poisson, collocation, solution

SECONDS = 10.0
points = collocation(1_000, torch.Generator().manual_seed(0)).double()  # for errors far below a per cent
axis = torch.linspace(0, 1, 60).double()
grid = torch.cartesian_prod(axis, axis)
exact = solution(grid)

# %%
# The model's output is the residuals, so that the loss is a mean square and K-FAC needs no special case;
# :mod:`natgrad.experiments.bench.workloads.physics` tells how. All runs start from the same weights, on the same 1,000
# points, and stop after the same processor time. Adam has three rates to choose from, each falling linearly to zero;
# its best is what counts. K-FAC has its defaults.


def train(rate: float | None) -> tuple[Poisson, list[tuple[float, float]]]:
    """With Adam at this rate, or with K-FAC; returns the model and (processor seconds, relative error of u)."""
    torch.manual_seed(0)
    model = Poisson(width=64, depth=3).double()
    optimizer: torch.optim.Optimizer
    if rate is None:
        optimizer = natgrad.KFAC(model, "mse")
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    curve, used, step = [], 0.0, 0
    while used < SECONDS:
        start = time.process_time()
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate * (1 - used / SECONDS)
        optimizer.zero_grad()
        mse_loss(model(points), points.new_zeros(len(points), 4)).backward()
        optimizer.step()
        used += time.process_time() - start
        if step % (2 if rate is None else 20) == 0:
            curve.append((used, relative_error(model)))
        step += 1
    print(f"{'natgrad.KFAC' if rate is None else f'Adam, rate {rate:g}'}: {step} steps")
    return model, [*curve, (used, relative_error(model))]


@torch.no_grad()
def relative_error(model: Poisson) -> float:
    """Of u on the grid, in the root mean square."""
    return float((model.values(grid)[:, 0] - exact).norm() / exact.norm())


rates = (5e-3, 1e-2, 2e-2)
adams = {rate: train(rate) for rate in rates}
for rate, (_, curve) in adams.items():
    print(f"Adam, rate {rate:g}: relative error {curve[-1][1]:.2e}")
best = min(rates, key=lambda rate: adams[rate][1][-1][1])
kfac, curve = train(None)
ratio = adams[best][1][-1][1] / curve[-1][1]
print(f"natgrad.KFAC: relative error {curve[-1][1]:.2e}, {ratio:.0f} times lower than Adam's best (rate {best:g})")

# %%
# Where the errors are, on one scale, and how they fell.

figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained", width_ratios=[1.5, 1, 1])
for rate, (_, other) in adams.items():
    name = f"Adam, best of {len(rates)} rates" if rate == best else None
    panels[0].semilogy(*zip(*other, strict=True), color="#0072B2", alpha=1 if name else 0.25, label=name)
panels[0].semilogy(*zip(*curve, strict=True), color="#D55E00", linewidth=2, label="natgrad.KFAC")
panels[0].set(xlabel="processor seconds", ylabel="relative error of u")
panels[0].spines[["top", "right"]].set_visible(False)
panels[0].legend(frameon=False)
with torch.no_grad():
    errors = [(model.values(grid)[:, 0] - exact).abs().reshape(60, 60) for model in (adams[best][0], kfac)]
for axes, error, title in zip(panels[1:], errors, ("Adam", "natgrad.KFAC"), strict=True):
    image = axes.imshow(error.log10(), cmap="magma", vmin=-6, vmax=-1, extent=(0, 1, 0, 1))
    axes.set(title=f"{title}: error of u", xticks=[0, 1], yticks=[0, 1])
colorbar = figure.colorbar(image, ax=panels[1:], shrink=0.85, ticks=[-6, -5, -4, -3, -2, -1])
colorbar.ax.set_yticklabels(["1e-6", "1e-5", "1e-4", "0.001", "0.01", "0.1"])
plt.show()

assert ratio > 10, ratio
