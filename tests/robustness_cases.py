"""Training with nothing set but model and loss, under everything that users vary without telling an optimizer.

`python tests/robustness_cases.py` runs all of it on five seeds, about half an hour, and writes the table
`benchmarks/results/robustness.md`.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.experiments import mnist


class Task(NamedTuple):
    """A network and a loss.

    Attributes:
        model: From multiples of width and of depth.
        told: The loss, as natgrad is told.
        loss: The same, as the loop computes it.
        target: From images and labels to what is to be learnt.
    """

    model: Callable[[int, int], nn.Module]
    told: str
    loss: Callable[[Tensor, Tensor], Tensor]
    target: Callable[[Tensor, Tensor], Tensor]


def mlp(sizes: Iterable[int], activation: type[nn.Module], *last: nn.Module) -> nn.Sequential:
    pairs = list(itertools.pairwise(sizes))
    layers = [layer for pair in pairs for layer in (nn.Linear(*pair), activation())]
    return nn.Sequential(*layers[:-1], *last)


def classifier(activation: type[nn.Module]) -> Callable[[int, int], nn.Module]:
    return lambda width, depth: mlp([784] + [48 * width] * (2 * depth) + [10], activation)


class Dropped(nn.Module):
    """Half of the hidden units."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x.relu(), training=self.training)


def conv_net(width: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
    for i in range(2 * depth):
        stride = 2 if i < 3 else 1
        layers += [nn.Conv2d(8 * width if i else 1, 8 * width, 3, stride, 1), nn.BatchNorm2d(8 * width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72 * width, 10))


def autoencoder(activation: type[nn.Module], *last: nn.Module) -> Callable[[int, int], nn.Module]:
    return lambda width, depth: mlp(
        [784] + [48 * width] * depth + [16] + [48 * width] * depth + [784], activation, *last
    )


def one_hot(x: Tensor, labels: Tensor) -> Tensor:
    return functional.one_hot(labels, 10).float()


def the_labels(x: Tensor, labels: Tensor) -> Tensor:
    return labels


def the_images(x: Tensor, labels: Tensor) -> Tensor:
    return x


TASKS = {
    "tanh MLP, cross-entropy": Task(classifier(nn.Tanh), "cross_entropy", functional.cross_entropy, the_labels),
    "ReLU MLP, cross-entropy": Task(classifier(nn.ReLU), "cross_entropy", functional.cross_entropy, the_labels),
    "ReLU MLP with dropout, cross-entropy": Task(
        classifier(Dropped), "cross_entropy", functional.cross_entropy, the_labels
    ),
    "ConvNet with BatchNorm, cross-entropy": Task(conv_net, "cross_entropy", functional.cross_entropy, the_labels),
    "tanh MLP, MSE": Task(classifier(nn.Tanh), "mse", functional.mse_loss, one_hot),
    "sigmoid autoencoder, MSE": Task(autoencoder(nn.Sigmoid, nn.Sigmoid()), "mse", functional.mse_loss, the_images),
    "ReLU autoencoder, MSE": Task(autoencoder(nn.ReLU), "mse", functional.mse_loss, the_images),
    "tanh autoencoder, BCE": Task(
        autoencoder(nn.Tanh), "bce_with_logits", functional.binary_cross_entropy_with_logits, the_images
    ),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is varied. The inputs, not the targets, become scale · x + shift."""

    batch: int = 500
    loss: float = 1.0
    scale: float = 1.0
    shift: float = 0.0
    width: int = 1
    depth: int = 1
    images: int = 2000
    steps: int = 40


SETTINGS = {
    "as it is": Setting(),
    "batch 64": Setting(batch=64, steps=80),
    "batch 2,000": Setting(batch=2000),
    "batch 10,000": Setting(batch=10_000, images=10_000, steps=20),
    "loss x 1e3": Setting(loss=1e3),
    "loss x 1e-3": Setting(loss=1e-3),
    "inputs x 100": Setting(scale=100.0),
    "inputs / 100": Setting(scale=0.01),
    "inputs + 10": Setting(shift=10.0),
    "twice as wide": Setting(width=2),
    "twice as deep": Setting(depth=2),
}


class Run(NamedTuple):
    """Unscaled losses, on 1,000 other images before and after, and on each batch before its step; and what was told."""

    before: float
    after: float
    losses: list[float]
    halvings: float
    skipped: float
    undone: float

    @property
    def learnt(self) -> float:
        """Loss left, as a share of the first."""
        return self.after / self.before


@functools.cache
def data() -> tuple[Tensor, Tensor]:
    return mnist.embedded()


def run(task: Task, setting: Setting, seed: int) -> Run:
    torch.manual_seed(seed)
    images, labels = data()
    model = task.model(setting.width, setting.depth)
    optimizer = natgrad.KFAC(model, task.told)

    def loss(some: slice | Tensor) -> Tensor:
        x = images[some]
        return task.loss(model(setting.scale * x + setting.shift), task.target(x, labels[some]))

    @torch.no_grad()
    def test() -> float:
        dropped = [module for module in model.modules() if isinstance(module, Dropped)]
        for module in dropped:
            module.eval()
        value = float(loss(slice(10_000, 11_000)))
        for module in dropped:
            module.train()
        return value

    before, losses, halvings = test(), [], 0.0
    for _ in range(setting.steps):
        value = loss(torch.randperm(setting.images)[: setting.batch])
        optimizer.zero_grad()
        (setting.loss * value).backward()
        optimizer.step()
        losses.append(float(value.detach()))
        halvings += optimizer.diagnostics(per_layer=False).get("halvings", 0.0)
    told = optimizer.diagnostics(per_layer=False)
    return Run(before, test(), losses, halvings, told["skipped_steps"], told["undone_steps"])


def row(name: str, runs: list[Run]) -> str:
    def median(values: Iterable[float]) -> str:
        return f"{statistics.median(values):.3g}"

    numbers = [
        median(r.before for r in runs),
        median(r.after for r in runs),
        f"{max(r.after for r in runs):.3g}",
        median(r.halvings for r in runs),
        f"{sum(r.undone for r in runs):.0f}",
        f"{sum(r.skipped for r in runs):.0f}",
    ]
    return f"| {name} | {' | '.join(numbers)} |"


HEADER = """\
`natgrad.KFAC(model, loss)`, nothing else set, on MNIST: `python tests/robustness_cases.py`. Five seeds each: medians of
the test loss before and after training, and the worst after it, unscaled; median number of halvings in all steps;
undone and skipped steps of all seeds. 40 steps, 80 at batch 64 and 20 at batch 10,000; batch 500 of 2,000 images where
nothing else is said."""


def main() -> None:
    """Run everything, and write the table as it grows."""
    path = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / "robustness.md"
    lines = ["# Robustness", "", *HEADER.splitlines()]
    for name, task in TASKS.items():
        lines += ["", f"## {name}", "", "| setting | before | after | worst | halvings | undone | skipped |"]
        lines += ["|" + "---|" * 7]
        for setting_name, setting in SETTINGS.items():
            runs = [run(task, setting, seed) for seed in range(5)]
            assert all(math.isfinite(r.after) for r in runs)
            lines.append(row(setting_name, runs))
            print(name, lines[-1], flush=True)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
