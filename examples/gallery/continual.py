r"""
Continual learning
==================

A network learns digits, then the same digits with shuffled pixels, and forgets some of the first task. A quadratic
penalty, :math:`\tfrac{\lambda}{2} (\theta - \theta_1)^\top F (\theta - \theta_1)`, holds it back where the first task
cares. With the whole Kronecker-factored block instead of its diagonal, it holds better.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

import natgrad
from natgrad.blocks import Block
from natgrad.experiments.mnist import embedded

torch.manual_seed(0)
images, labels = embedded()
small = avg_pool2d(images.reshape(-1, 1, 28, 28), 2).flatten(1)
shuffled = small[:, torch.randperm(196)]
N, STEPS = 1_000, 80
y, y_test = labels[:N], labels[-N:]
first, second = (small[:N], small[-N:]), (shuffled[:N], shuffled[-N:])
model = nn.Sequential(nn.Linear(196, 64), nn.Tanh(), nn.Linear(64, 10))


@torch.no_grad()
def accuracy(x: Tensor) -> float:
    """On test images."""
    return float((model(x).argmax(dim=1) == y_test).float().mean())


optimizer = natgrad.KFAC(model, "cross_entropy")
for _ in range(15):
    optimizer.zero_grad()
    cross_entropy(model(first[0]), y).backward()
    optimizer.step()
anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
print(f"first task learned: {accuracy(first[1]):.1%}")

# %%
# What the first task cares about: its curvature there, as blocks and as their diagonals.

blocks = natgrad.curvature(model, first[0], y, "cross_entropy", fisher="exact")


def moved(name: str) -> Tensor:
    """How far a layer's matrix [W b] is from where the first task left it."""
    layer = model.get_submodule(name)
    steps = [p - anchor[f"{name}.{key}"] for key, p in layer.named_parameters()]
    return torch.cat([steps[0], steps[1][:, None]], dim=1)


def diagonal(block: Block) -> Tensor:
    """Of kron(G, A), as a matrix (out, in + 1)."""
    return block.G.diagonal()[:, None] * block.A.diagonal()


def penalty(kind: str) -> Tensor:
    """½ (θ − θ₁)ᵀ F (θ − θ₁)."""
    total = torch.zeros(())
    for name, block in blocks.items():
        M = moved(name)
        total = total + 0.5 * (M * (block.matvec(M) if kind == "kron" else diagonal(block) * M)).sum()
    return total


# %%
# The second task, by Adam, with five strengths of each penalty.


def learn(kind: str, strength: float) -> list[tuple[float, float]]:
    """Accuracy on the first and on the second task over the steps."""
    model.load_state_dict(anchor)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    curve = [(accuracy(first[1]), accuracy(second[1]))]
    for _ in range(STEPS):
        adam.zero_grad()
        loss = cross_entropy(model(second[0]), y)
        if strength:
            loss = loss + strength * penalty(kind)
        loss.backward()
        adam.step()
        curve.append((accuracy(first[1]), accuracy(second[1])))
    return curve


runs = {("none", 0.0): learn("none", 0.0)}
for kind in ("diagonal", "kron"):
    runs |= {(kind, 10.0**power): learn(kind, 10.0**power) for power in range(1, 6)}


def best(kind: str) -> list[tuple[float, float]]:
    """The run of a kind with the highest mean accuracy on both tasks at the end."""
    return max((curve for (own, _), curve in runs.items() if own == kind), key=lambda curve: sum(curve[-1]))


looks = {
    "none": ("no penalty", "#8c8c8c"),
    "diagonal": ("diagonal", "#0072B2"),
    "kron": ("Kronecker-factored", "#D55E00"),
}
figure, panels = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
for kind, (label, colour) in looks.items():
    for axes, task in zip(panels, (0, 1), strict=False):
        axes.plot([values[task] for values in best(kind)], color=colour, label=label, linewidth=2)
    for style, task in (("o-", 0), ("o:", 1)):
        ends = [(strength, curve[-1][task]) for (own, strength), curve in runs.items() if own == kind and strength]
        panels[2].semilogx([x for x, _ in ends], [y for _, y in ends], style, color=colour)
    print(f"{label}: first task {best(kind)[-1][0]:.1%}, second task {best(kind)[-1][1]:.1%}")
panels[0].set(title="first task, while the second is learned", xlabel="steps", ylabel="test accuracy")
panels[1].set(title="second task", xlabel="steps")
panels[2].set(title="at the end: first task solid, second dotted", xlabel="strength of the penalty")
panels[0].legend(frameon=False)
for axes in panels:
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

assert sum(best("kron")[-1]) > sum(best("diagonal")[-1]) > sum(best("none")[-1])
