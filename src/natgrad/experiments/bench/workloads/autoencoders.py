"""Autoencoders of MNIST: the article's, and the classical one of Hinton and Salakhutdinov (2006)."""

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad.experiments import autoencoder, mnist
from natgrad.experiments.bench.workload import Batch, Workload, epochs, evaluating, seeded
from natgrad.experiments.settings import Settings
from natgrad.likelihoods import Bernoulli, Gaussian

CLASSICAL = (784, 1000, 500, 250, 30)


def article(name: str, seconds: float, settings: Settings) -> Workload:
    """The article's network on the data that the settings describe; of these, the seed does not matter.

    Returns:
        A workload whose held-out loss is the article's test loss.
    """
    problem = autoencoder.Problem(settings)

    def seeded_settings(seed: int) -> Settings:
        return Settings(**{**settings.to_json(), "seed": seed})

    def batches(seed: int) -> Iterator[Batch]:
        own = copy.copy(problem)  # with the same images
        own.settings = seeded_settings(seed)
        yield from ((x, x) for x in map(own.batch, itertools.count()))

    return Workload(
        name=name,
        title=f"article's autoencoder, {settings.describe()}",
        model=lambda seed: autoencoder.network(seeded_settings(seed)),
        batches=batches,
        loss=autoencoder.half_squared_error,
        natgrad_loss=Gaussian(reduction="batchmean"),
        evaluate=lambda model: {"loss": problem.test_loss(model)},
        seconds=seconds,
    )


def classical(name: str, seconds: float, images: int = 10_000, widths: tuple[int, ...] = CLASSICAL) -> Workload:
    """The encoder 784-1000-500-250-30 with tanh and a linear code, its mirror image as decoder, biases everywhere.

    Weights are uniform after Glorot and Bengio (2010), biases zero. The loss is the Bernoulli cross-entropy summed over
    pixels; what the literature compares is the squared error per image, summed over pixels: of all training images
    (``train_error``) and of the test images (``test_error``).

    Args:
        name: Of the workload.
        seconds: Training time of a run.
        images: How many to train on, in one full batch: up to 10,000 of the 20,000 embedded ones, tested on the next
            10,000; more are those of the full data set, tested on its test images.
        widths: From the pixels to the code.

    Raises:
        DownloadError: More than 10,000 images, and the full data set cannot be had.
    """
    if images <= 10_000:
        every, _ = mnist.embedded()
        train, test = every[:images].clone(), every[10_000 : 10_000 + images].clone()
    else:
        full = mnist.download()
        train, test = full.train_images[:images], full.test_images

    def evaluate(model: nn.Module) -> dict[str, float]:
        logits = model(test)
        return {
            "loss": summed_cross_entropy(logits, test).item(),
            "train_error": squared_error(model(train), train).item(),
            "test_error": squared_error(logits, test).item(),
        }

    return Workload(
        name=name,
        title=f"classical autoencoder {'-'.join(map(str, widths))}, tanh, {images:,} images, full batch",
        model=seeded(lambda: _mirrored(widths)),
        batches=lambda seed: epochs(train, train, images, seed),
        loss=summed_cross_entropy,
        natgrad_loss=Bernoulli(reduction="batchmean"),
        evaluate=evaluating(evaluate),
        seconds=seconds,
    )


def summed_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over images of the Bernoulli cross-entropy summed over pixels: (N, 784), (N, 784) -> scalar."""
    return functional.binary_cross_entropy_with_logits(logits, target, reduction="sum") / target.shape[0]


def squared_error(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over images of the squared error of the probabilities summed over pixels."""
    return (torch.sigmoid(logits) - target).square().sum() / target.shape[0]


def _mirrored(widths: tuple[int, ...]) -> nn.Sequential:
    there_and_back = [*widths, *reversed(widths[:-1])]
    linear = [nn.Linear(a, b) for a, b in itertools.pairwise(there_and_back)]
    for layer in linear:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    modules: list[nn.Module] = []
    for i, layer in enumerate(linear, start=1):
        is_linear = i in (len(widths) - 1, len(linear))  # the code and the output
        modules += [layer] if is_linear else [layer, nn.Tanh()]
    return nn.Sequential(*modules)
