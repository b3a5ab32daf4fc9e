"""
Reading curvature spectra
=========================

Eigenvalues of a layer's block say how many directions the data care about, and how much damping will freeze. Here the
blocks of a small classifier are computed three ways: exactly (a dense matrix by brute force), by K-FAC, and by EKFAC,
which keeps K-FAC's eigenvectors and corrects the eigenvalues.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

import natgrad
from natgrad.experiments.mnist import embedded

torch.manual_seed(0)
images, labels = embedded()
x = avg_pool2d(images[:1_000].reshape(-1, 1, 28, 28), 4).flatten(1)  # 7 × 7, so that dense blocks fit
y = labels[:1_000]


def network() -> nn.Module:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(49, 16), nn.Tanh(), nn.Linear(16, 10))


def dense_block(parameters: dict[str, Tensor]) -> Tensor:
    """The exact GGN over [W b] of the first layer, 800 × 800: the mean over data of Jᵀ (diag p − p pᵀ) J."""

    def output(matrix: Tensor, datum: Tensor) -> Tensor:
        moved = {**parameters, "0.weight": matrix[:, :-1], "0.bias": matrix[:, -1]}
        logits: Tensor = torch.func.functional_call(model, moved, (datum,))
        return logits

    here = torch.cat([parameters["0.weight"], parameters["0.bias"][:, None]], dim=1)
    total = torch.zeros(here.numel(), here.numel())
    for some in x.split(100):
        J = torch.func.vmap(torch.func.jacrev(output), (None, 0))(here, some).flatten(2)  # (N, 10, entries)
        p = torch.func.functional_call(model, parameters, (some,)).softmax(dim=1)
        root = p.sqrt()[:, :, None] * (J - (p[:, None] @ J))  # (diag p − p pᵀ) = Σ_k p_k (e_k − p)(e_k − p)ᵀ
        total += torch.einsum("nki,nkj->ij", root, root)
    return total / len(x)


def spectra() -> dict[str, Tensor]:
    """Eigenvalues of the first layer's block, in descending order."""
    parameters = {name: p.detach() for name, p in trained.named_parameters()}
    model.load_state_dict(parameters)
    kfac = natgrad.curvature(model, x, y, "cross_entropy", fisher="exact")["0"]
    ekfac = natgrad.curvature(model, x, y, "cross_entropy", fisher="exact", ekfac=True)["0"]
    exact = torch.linalg.eigvalsh(dense_block(parameters).double())
    return {"exact": exact.flip(0), "K-FAC": kfac.eigenvalues.flip(0), "EKFAC": ekfac.eigenvalues.flip(0)}


# %%
# Before training and after, as training changes the curvature by orders of magnitude.

trained, model = network(), network()  # the second without the optimizer's hooks
before = spectra()
optimizer = natgrad.KFAC(trained, "cross_entropy")
for _ in range(25):
    optimizer.zero_grad()
    loss = cross_entropy(trained(x), y)
    loss.backward()
    optimizer.step()
after = spectra()
print(f"training loss {loss.item():.3f}")
for name, values in after.items():
    half = int((values.cumsum(0) < 0.9 * values.sum()).sum()) + 1
    print(f"{name}: largest {values[0]:.3g}, sum {values.sum():.3g}, 90 % of it in {half} of {len(values)} directions")

# %%
# How to read it. A few directions hold almost all of the curvature; a long tail has next to none, and below the
# dotted line a damping of that size decides the step. With the initial weights all three agree. After training
# K-FAC's spectrum, all products of two short spectra, has too much in the tail; EKFAC has the exact diagonal in its
# basis, and so the exact sum.

figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
styles = {"exact": ("#333333", "-"), "K-FAC": ("#D55E00", "-"), "EKFAC": ("#0072B2", "--")}
for axes, values_of, title in ((panels[0], before, "before training"), (panels[1], after, "after 25 steps")):
    for name, values in values_of.items():
        axes.semilogy(
            range(1, len(values) + 1), values.clamp(min=1e-12), styles[name][1], color=styles[name][0], label=name
        )
    axes.axhline(1e-4, color="#8c8c8c", linestyle=":")
    axes.text(1.2, 1.2e-4, "a damping of 1e-4", color="#666666", fontsize=9)
    axes.set(title=title, xlabel="rank", xscale="log", ylim=(1e-9, 10))
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("eigenvalue of the first layer's block")
panels[0].legend(frameon=False, loc="lower left")
plt.show()

assert abs(after["EKFAC"].sum() / after["exact"].sum() - 1) < 1e-3
distance = {name: (after[name].double() - after["exact"]).norm() for name in ("K-FAC", "EKFAC")}
assert distance["EKFAC"] < distance["K-FAC"]
