"""Classifiers of MNIST on minibatches of 500: 10,000 embedded images to train on, the other 10,000 to test."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad.experiments import mnist
from natgrad.experiments.bench.workload import Workload, epochs, evaluating, seeded

IMAGES, BATCH = 10_000, 500


def mlp(name: str, seconds: float, widths: tuple[int, ...] = (512, 512), images: int = IMAGES) -> Workload:
    """784-512-512-10 with tanh, as torch initializes it."""

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise((784, *widths)):
            layers += [nn.Linear(a, b), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 10))

    return _classifier(name, f"tanh MLP 784-{'-'.join(map(str, widths))}-10", seconds, build, (784,), images)


def convnet(name: str, seconds: float, channels: tuple[int, ...] = (8, 16, 32), images: int = IMAGES) -> Workload:
    """3×3 convolutions, each with BatchNorm, ReLU and (but for the last) 2×2 max-pooling; then the mean over space."""

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise((1, *channels)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10))

    title = f"ConvNet with BatchNorm, {'-'.join(map(str, channels))} channels"
    return _classifier(name, title, seconds, build, (1, 28, 28), images)


def _classifier(
    name: str, title: str, seconds: float, build: Callable[[], nn.Module], shape: tuple[int, ...], images: int
) -> Workload:
    every, labels = mnist.embedded()
    every = every.reshape(-1, *shape)
    train, test = slice(0, images), slice(IMAGES, IMAGES + images)

    def evaluate(model: nn.Module) -> dict[str, float]:
        logits = torch.cat([model(x) for x in every[test].split(BATCH)])
        return {
            "loss": functional.cross_entropy(logits, labels[test]).item(),
            "accuracy": _accuracy(logits, labels[test]),
        }

    return Workload(
        name=name,
        title=f"{title}, {images:,} images, batch {BATCH}",
        model=seeded(build),
        batches=lambda seed: epochs(every[train], labels[train], BATCH, seed),
        loss=functional.cross_entropy,
        natgrad_loss="cross_entropy",
        evaluate=evaluating(evaluate),
        seconds=seconds,
    )


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).float().mean().item()
