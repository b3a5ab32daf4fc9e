r"""
Influence of training examples
==============================

Which training images made the network decide as it did? Leaving datum n out moves the weights by about
:math:`\tfrac1N F^{-1} \nabla \ell_n`, and so changes the loss at a test image by :math:`\tfrac1N \nabla \ell^\top
F^{-1} \nabla \ell_n`. :meth:`~natgrad.blocks.Block.solve` makes that one line a layer. The same with itself finds
labels that are wrong.
"""

from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import natgrad
from natgrad.experiments.mnist import embedded

torch.manual_seed(0)
images, labels = embedded()
N, WRONG = 1_000, 50
x, y = images[:N], labels[:N].clone()
wrong = torch.randperm(N)[:WRONG]
y[wrong] = (y[wrong] + torch.randint(1, 10, (WRONG,))) % 10


def network() -> nn.Module:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(784, 32), nn.Tanh(), nn.Linear(32, 10))


trained = network()
optimizer = natgrad.KFAC(trained, "cross_entropy", weight_decay=1e-2)
for _ in range(4):
    optimizer.zero_grad()
    cross_entropy(trained(x), y).backward()
    optimizer.step()
model = network()  # without the optimizer's hooks, as each datum is differentiated by itself below
model.load_state_dict(trained.state_dict())

# %%
# Each datum's gradient, as every layer's matrix [W b]; and the same preconditioned.


def gradients(some_x: Tensor, some_y: Tensor) -> dict[str, Tensor]:
    """By layer, (N, out, in + 1)."""

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(model, parameters, (image,)), label)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, some_x, some_y)
    return {name: torch.cat([found[f"{name}.weight"], found[f"{name}.bias"][..., None]], -1) for name in blocks}


blocks = natgrad.curvature(model, x, y, "cross_entropy", fisher="exact")
train = gradients(x, y)
damped = {name: 0.1 * block.trace().item() / block.spectrum.numel() for name, block in blocks.items()}
solved = {name: block.solve(train[name], damped[name]) for name, block in blocks.items()}

# %%
# A datum's influence on itself is large where the network had to bend for it. Among the images with the most are
# those whose labels were changed.

itself = sum((solved[name] * train[name]).sum((1, 2)) for name in blocks)
assert isinstance(itself, Tensor)
suspects = itself.argsort(descending=True)
found = torch.isin(suspects, wrong).cumsum(0)
print(f"of the {WRONG} images with the largest influence on themselves, {found[WRONG - 1]} have a wrong label")

# %%
# For three test images: the training images that helped most, and those that hurt most. Titles are the labels used in
# training.

picked = [10_008, 10_018, 10_050]
test = gradients(images[picked], labels[picked])
influence = sum(torch.einsum("toi,noi->tn", test[name], solved[name]) for name in blocks)
assert isinstance(influence, Tensor)

figure = plt.figure(figsize=(11, 6.2), layout="constrained")
parts: Any = figure.subfigures(2, 1, height_ratios=[3, 1.7])
top, bottom = parts
panels = top.subplots(3, 9)
for row, (index, effect) in enumerate(zip(picked, influence, strict=True)):
    order = effect.argsort(descending=True)
    shown = [(images[index], f"test: {labels[index]}", "black")]
    shown += [(x[n], f"{y[n]}", "#0072B2") for n in order[:4]] + [(x[n], f"{y[n]}", "#D55E00") for n in order[-4:]]
    for axes, (image, title, colour) in zip(panels[row], shown, strict=True):
        axes.imshow(image.reshape(28, 28), cmap="gray_r")
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, color=colour, fontsize=10, pad=2)
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=2)
top.suptitle("Blue helped most, orange hurt most", fontsize=11)
axes = bottom.subplots()
axes.plot(range(1, N + 1), found, color="#D55E00", label="by influence on themselves")
axes.plot([0, N], [0, WRONG], color="#8c8c8c", linestyle="--", label="by chance")
axes.set(xlabel="training images looked at", ylabel=f"of {WRONG} wrong labels", xlim=(0, N))
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="lower right")
plt.show()

assert found[WRONG - 1] > 0.4 * WRONG  # by chance 2.5
