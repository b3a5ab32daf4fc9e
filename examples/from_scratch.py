"""K-FAC from scratch: a matrix product whose backward pass has three modes. `python examples/from_scratch.py`, 10 s.

Under ½‖f − y‖², averaged over the images, a layer z = W x of a deep *linear* network has the Hessian G ⊗ A: A is the
second moment of the inputs x, and G that of Gaussian errors at the output f, propagated back to z. Newton's step is

    W  ←  W − rate · G⁻¹ ∇W A⁻¹
and whitens the gradient on both sides (docs/derivation.md). In a net with sigmoids it is an approximation that works.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from natgrad.experiments.mnist import embedded


class Matmul(torch.autograd.Function):
    """x Wᵀ, where x is (N, in). In every `mode` the same gradient goes down to x; what W gets differs."""

    mode = "standard"

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, layer: "Layer") -> Tensor:  # noqa: D102
        ctx.save_for_backward(x, W)
        ctx.layer = layer
        return x @ W.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None]:  # noqa: D102
        (x, W), layer = ctx.saved_tensors, ctx.layer
        if Matmul.mode == "capture":
            layer.A, layer.G = x.T @ x / len(x), g.T @ g / len(x)
            return g @ W, None, None
        if Matmul.mode == "kfac":
            return g @ W, layer.G_inverse @ (g.T @ x) @ layer.A_inverse, None
        return g @ W, g.T @ x, None


class Layer:
    """The matrix W of a layer sigmoid(W x), and the factors A and G that `Matmul` captures for it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.W = torch.nn.init.xavier_uniform_(torch.empty(outputs, inputs)).requires_grad_()
        self.A, self.G = torch.eye(inputs), torch.eye(outputs)

    def invert(self, damping: float) -> None:
        """Damped, because the data leave some directions unseen."""
        self.A_inverse, self.G_inverse = (torch.linalg.inv(F + damping * torch.eye(len(F))) for F in (self.A, self.G))


def backward(layers: list[Layer], images: Tensor, noise: Tensor | None = None, damping: float = 0.005) -> float:
    """Fill every `W.grad` with the gradient or, given noise for the output, the natural one. Returns the loss."""
    output = images
    for layer in layers:
        output = torch.sigmoid(Matmul.apply(output, layer.W, layer))  # type: ignore[no-untyped-call]
    if noise is not None:
        Matmul.mode = "capture"
        torch.autograd.backward(output, noise, retain_graph=True)
        for layer in layers:
            layer.invert(damping)
    Matmul.mode = "standard" if noise is None else "kfac"
    loss = (output - images).square().sum() / 2 / len(images)
    torch.autograd.backward(loss)
    return loss.item()


if __name__ == "__main__":
    images = embedded()[0][:1500]
    for method, rate, kfac in (("gradient descent", 0.2, False), ("K-FAC", 0.15, True)):
        torch.manual_seed(0)
        layers = [Layer(i, o) for i, o in pairwise([784, 256, 256, 256, 64, 256, 256, 256, 784])]
        optimizer = torch.optim.SGD([layer.W for layer in layers], lr=rate)
        for step in range(31):
            optimizer.zero_grad()
            loss = backward(layers, images, torch.randn_like(images) if kfac else None)
            optimizer.step()
            print(f"{method}, step {step}: loss {loss:.2f}")
        assert loss < 15 if kfac else loss > 25  # gradient descent is left drawing the mean image, which costs 26
