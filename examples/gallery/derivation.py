r"""
The derivation in numbers
=========================

In a deep *linear* network with squared error, the Hessian of a layer is a Kronecker product, :math:`H = G \otimes A`,
and K-FAC's step is Newton's. Nothing is approximated; this page compares both sides, entry by entry.
"""

from typing import cast

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import natgrad

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)).double()
x, y = torch.randn(40, 4).double() @ torch.randn(4, 4).double(), torch.randn(40, 3).double()
layer = cast(nn.Linear, model[1])

# %%
# The left side, by brute force: differentiate the loss twice in the middle layer's matrix [W b].


def loss_of(matrix: Tensor) -> Tensor:
    """The loss with another matrix [W b], (4, 6), in the middle layer."""
    h = model[0](x) @ matrix[:, :-1].T + matrix[:, -1]
    return mse_loss(model[2](h), y)


here = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()
hessian = torch.func.hessian(loss_of)(here).reshape(24, 24).detach()

# %%
# The right side: two small matrices, A from the layer's inputs and G from errors sent back to its outputs.

block = natgrad.curvature(model, x, y, "mse", fisher="exact")["1"]
kronecker = torch.kron(block.G, block.A)
error = ((hessian - kronecker).norm() / hessian.norm()).item()
print(f"A is {tuple(block.A.shape)}, G is {tuple(block.G.shape)}, relative difference of the two sides: {error:.1e}")

# %%
# So one step of this layer, at rate 1, lands on its minimum: the gradient afterwards is rounding error.

gradient = torch.func.grad(loss_of)(here)
after = here - block.solve(gradient)
left_over = torch.func.grad(loss_of)(after).norm().item()
print(f"gradient before: {gradient.norm().item():.2e}, after: {left_over:.2e}")

# %%
# With one random vector per datum instead of one per output, G is noisy, and its error falls as the root of their
# number.

counts = [2**k for k in range(10)]
errors: list[float] = []
for count in counts:
    draws = [natgrad.curvature(model, x, y, "mse", fisher="mc", mc_samples=count, seed=s)["1"].G for s in range(8)]
    errors.append((torch.stack(draws) - block.G).norm(dim=(1, 2)).mean().item() / block.G.norm().item())

figure, (left, right, below) = plt.subplots(1, 3, figsize=(11, 3.7), layout="constrained")
bound = hessian.abs().max().item()
left.imshow(hessian, cmap="RdBu", vmin=-bound, vmax=bound)
left.set(title="Hessian, differentiated twice", xticks=[], yticks=[])
right.imshow(kronecker, cmap="RdBu", vmin=-bound, vmax=bound)
right.set(title=r"$G \otimes A$, of a 4×4 and a 6×6 matrix", xticks=[], yticks=[])
below.loglog(counts, errors, "o-", color="#D55E00", label="measured")
below.loglog(counts, [errors[0] / count**0.5 for count in counts], "--", color="#8c8c8c", label="(draws)$^{-1/2}$")
below.set(title="Monte Carlo: relative error of G", xlabel="draws per datum")
below.spines[["top", "right"]].set_visible(False)
below.legend(frameon=False)
plt.show()

assert error < 1e-12
assert left_over < 1e-10
assert errors[-1] < errors[0] / 15  # 22.6 in expectation
