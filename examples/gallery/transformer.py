"""
Fine-tuning a small transformer
===============================

A transformer that knows how to reverse a sequence of digits is to sort it instead. AdamW, at the best of three rates,
and K-FAC with nothing set go on from the same weights. ``nn.MultiheadAttention``, embeddings and layer norms all have
blocks, so the training loop is the usual one.
"""

import time
from copy import deepcopy

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import natgrad

LENGTH, DIGITS, WIDTH, SECONDS = 8, 10, 32, 6.0
torch.manual_seed(0)


class Transformer(nn.Module):
    """Digits (N, LENGTH) → logits (N, LENGTH, DIGITS), every position seeing all others."""

    def __init__(self) -> None:
        super().__init__()
        self.digit, self.place = nn.Embedding(DIGITS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, DIGITS)

    def forward(self, digits: Tensor) -> Tensor:
        """As the class says."""
        places = torch.arange(LENGTH).expand_as(digits)
        logits: Tensor = self.head(self.body(self.digit(digits) + self.place(places)))
        return logits


def draw(count: int, generator: torch.Generator) -> Tensor:
    """Random digits (count, LENGTH)."""
    return torch.randint(DIGITS, (count, LENGTH), generator=generator)


criterion = nn.CrossEntropyLoss()


def loss_of(model: nn.Module, digits: Tensor, target: Tensor) -> Tensor:
    """Mean over all positions of all sequences."""
    loss: Tensor = criterion(model(digits).flatten(0, 1), target.flatten())
    return loss


pretrained = Transformer()
generator = torch.Generator().manual_seed(1)
adamw = torch.optim.AdamW(pretrained.parameters(), lr=3e-3)
for _ in range(120):
    digits = draw(128, generator)
    adamw.zero_grad()
    loss = loss_of(pretrained, digits, digits.flip(1))
    loss.backward()
    adamw.step()
print(f"reversing, after pretraining: loss {loss.item():.3f}")
print(natgrad.describe(pretrained))

# %%
# Fine-tuning: 256 fresh sequences a step, the same processor time for all. K-FAC is given the loss module that the
# loop calls, and so sees the flattened positions as the loss does.

held_out = draw(1_000, torch.Generator().manual_seed(2))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the positions of held-out sequences that are sorted right."""
    return float((model(held_out).argmax(-1) == held_out.sort(dim=1).values).float().mean())


def fine_tune(rate: float | None) -> tuple[nn.Module, list[tuple[float, float]]]:
    """With AdamW at this rate, or with K-FAC; returns the model and (processor seconds, accuracy)."""
    model = deepcopy(pretrained)
    optimizer: torch.optim.Optimizer = natgrad.KFAC(model, criterion)
    if rate is not None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    stream, used, step, curve = torch.Generator().manual_seed(3), 0.0, 0, [(0.0, accuracy(model))]
    while used < SECONDS:
        start = time.process_time()
        digits = draw(256, stream)
        optimizer.zero_grad()
        loss_of(model, digits, digits.sort(dim=1).values).backward()
        optimizer.step()
        used, step = used + time.process_time() - start, step + 1
        if step % (2 if rate is None else 10) == 0:
            curve.append((used, accuracy(model)))
    print(f"{'natgrad.KFAC' if rate is None else f'AdamW, {rate:g}'}: {step} steps")
    return model, [*curve, (used, accuracy(model))]


runs = {f"AdamW, {rate:g}": fine_tune(rate) for rate in (3e-3, 1e-2, 3e-2)} | {"natgrad.KFAC": fine_tune(None)}
curves = {name: run[1] for name, run in runs.items()}
for name, curve in curves.items():
    print(f"{name}: accuracy {curve[-1][1]:.2%}")

# %%
# Left, how the accuracy grew. Right, what the network says about one sequence, from the top: which digit, at each
# position.

figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained", width_ratios=[1.8, 1, 1])
for (name, curve), colour in zip(curves.items(), ("#9BD7FA", "#4FA8E8", "#0072B2", "#D55E00"), strict=True):
    panels[0].plot(*zip(*curve, strict=True), color=colour, label=name, linewidth=2)
panels[0].set(xlabel="processor seconds", ylabel="positions sorted right", ylim=(0, 1.02))
panels[0].spines[["top", "right"]].set_visible(False)
panels[0].legend(frameon=False, loc="lower right")
sequence = held_out[:1]
shown = {"before: reversed": pretrained, "after: sorted": runs["natgrad.KFAC"][0]}
for axes, (title, model) in zip(panels[1:], shown.items(), strict=True):
    axes.imshow(model(sequence)[0].detach().softmax(1), cmap="Oranges", vmin=0, vmax=1)
    axes.set(
        title=f"{title}\n{' '.join(map(str, sequence[0].tolist()))}", xlabel="digit", xticks=range(DIGITS), yticks=[]
    )
panels[1].set_ylabel("position")
plt.show()

best = {name: curve[-1][1] for name, curve in curves.items()}
assert best["natgrad.KFAC"] > max(best.values()) - 0.02, best
