r"""
A physics-informed network, to high accuracy
============================================

A network that solves Poisson's equation :math:`-\Delta u = f` on the unit square learns from the equation's
residuals, not from data. There is no noise to average out, only bad conditioning: Adam crawls, and L-BFGS is what
people turn to. K-FAC goes further than both.
"""

import math
import time

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import natgrad

SECONDS = 10.0
generator = torch.Generator().manual_seed(0)
inside = torch.rand(900, 2, generator=generator)
along, zero = torch.rand(30, 1, generator=generator), torch.zeros(30, 1)
boundary = torch.cat([torch.cat(side, 1) for x in (zero, zero + 1) for side in ((along, x), (x, along))])
axis = torch.linspace(0, 1, 60)
grid = torch.cartesian_prod(axis, axis)


def solution(x: Tensor) -> Tensor:
    """u, for f = 2π² u."""
    return (math.pi * x).sin().prod(-1, keepdim=True)


# %%
# The model returns the residuals: of the equation inside, by two calls of ``torch.autograd.grad``, and of u = 0 on the
# boundary, at other points and fewer. Both have a mean square as their loss, and natgrad is told so, with the weight
# that the training loop gives to the second. It sees every use of the weights, also those in derivatives.


class Poisson(nn.Module):
    """u as a network, and the residuals of its equation."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 64)]
        self.u = nn.Sequential(*(module for layer in layers for module in (layer, nn.Tanh())), nn.Linear(64, 1))

    def forward(self, inside: Tensor, boundary: Tensor) -> dict[str, Tensor]:
        """By name; of points inside, (N, 2), and on the boundary, (M, 2)."""
        x = inside.detach().requires_grad_()
        slope = derivative(self.u(x), x)
        laplacian = sum(derivative(slope[:, i], x)[:, i : i + 1] for i in range(2))
        return {"inside": laplacian + 2 * math.pi**2 * solution(x), "boundary": self.u(boundary)}


def derivative(f: Tensor, x: Tensor) -> Tensor:
    """Of each f by its own x."""
    return torch.autograd.grad(f.sum(), x, create_graph=True)[0]


WEIGHT = 100.0

# %%
# All runs start from the same weights, on the same points, and stop after the same processor time. Adam has three rates
# to choose from, each falling linearly to zero; its best is what counts. L-BFGS has a line search. K-FAC has its
# defaults.

Curve = list[tuple[float, float]]


def train(name: str | float) -> tuple[Poisson, Curve]:
    """Train with Adam at this rate, or by name; returns the model and (processor seconds, relative error of u)."""
    torch.manual_seed(0)
    model = Poisson()
    optimizer: torch.optim.Optimizer
    if name == "natgrad.KFAC":
        optimizer = natgrad.KFAC(model, {"inside": "mse", "boundary": (WEIGHT, "mse")})
    elif name == "L-BFGS":
        optimizer = torch.optim.LBFGS(model.parameters(), history_size=50, line_search_fn="strong_wolfe")
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=float(name), fused=True)

    def loss() -> Tensor:
        """Of the current weights, with gradients."""
        optimizer.zero_grad()
        residuals = model(inside, boundary)
        value: Tensor = residuals["inside"].square().mean() + WEIGHT * residuals["boundary"].square().mean()
        value.backward()
        return value

    curve, used, step = [], 0.0, 0
    while used < SECONDS:
        start = time.process_time()
        if isinstance(name, float):
            optimizer.param_groups[0]["lr"] = name * (1 - used / SECONDS)
        optimizer.step(loss)  # which L-BFGS evaluates several times
        used += time.process_time() - start
        if step % (20 if isinstance(name, float) else 1) == 0:
            curve.append((used, relative_error(model)))
        step += 1
    curve.append((used, relative_error(model)))
    print(f"{name}: {step} steps, relative error {curve[-1][1]:.2e}")
    return model, curve


@torch.no_grad()
def relative_error(model: Poisson) -> float:
    """Of u on the grid, in the root mean square."""
    exact = solution(grid)
    return float((model.u(grid) - exact).norm() / exact.norm())


RATES = (3e-3, 1e-2, 2e-2)
runs = {name: train(name) for name in (*RATES, "L-BFGS", "natgrad.KFAC")}
end = {name: curve[-1][1] for name, (_, curve) in runs.items()}
best = min(RATES, key=end.__getitem__)
adam, lbfgs = (end[name] / end["natgrad.KFAC"] for name in (best, "L-BFGS"))
print(f"natgrad.KFAC: {adam:.0f} times lower than Adam (rate {best:g}), {lbfgs:.0f} times lower than L-BFGS")

# %%
# Where the errors are, on one scale, and how they fell.

shown = {best: f"Adam, best of {len(RATES)} rates", "L-BFGS": "L-BFGS", "natgrad.KFAC": "natgrad.KFAC"}
colours = {"L-BFGS": "#009E73", "natgrad.KFAC": "#D55E00"}
figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained", width_ratios=[1.5, 1, 1])
for name, (_, curve) in runs.items():
    colour, alpha = colours.get(str(name), "#0072B2"), 1 if name in shown else 0.25
    panels[0].semilogy(*zip(*curve, strict=True), color=colour, alpha=alpha, label=shown.get(name))
panels[0].set(xlabel="processor seconds", ylabel="relative error of u")
panels[0].spines[["top", "right"]].set_visible(False)
panels[0].legend(frameon=False)
for axes, name in zip(panels[1:], ("L-BFGS", "natgrad.KFAC"), strict=True):
    with torch.no_grad():
        error = (runs[name][0].u(grid) - solution(grid)).abs().reshape(60, 60)
    image = axes.imshow(error.log10(), cmap="magma", vmin=-6, vmax=-2, extent=(0, 1, 0, 1))
    axes.set(title=f"{name}: error of u", xticks=[0, 1], yticks=[0, 1])
colorbar = figure.colorbar(image, ax=panels[1:], shrink=0.85, ticks=[-6, -5, -4, -3, -2])
colorbar.ax.set_yticklabels(["1e-6", "1e-5", "1e-4", "0.001", "0.01"])
plt.show()

assert adam > 10, end
assert lbfgs > 2, end
