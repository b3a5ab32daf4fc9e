"""The article's experiment: a deep MNIST autoencoder that first-order methods find hard.

    784-1024-1024-1024-196-1024-1024-1024-784, no biases, a nonlinearity after every layer, the output included
    loss = mean over images of 1/2 * sum over pixels of (output - image)^2

The weights are drawn layer by layer from NumPy's legacy random stream, uniform in +-sqrt(6 / (in + out + 1)), so that a
run starts where the article's did: at 97.54 (train) and 97.58 (test), with the sigmoid and seed 1. The training set is
the first 10,000 images, the test set the next 10,000.
"""

import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from natgrad.experiments import mnist
from natgrad.experiments.settings import ARTICLE_IMAGES, Settings

PIXELS, HIDDEN, CODE = 784, 1024, 196
_ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}


def network(settings: Settings) -> nn.Sequential:
    """The autoencoder with its initial weights; equal settings give equal weights.

    Returns:
        A model from images (N, 784) to reconstructions (N, 784).
    """
    stream = np.random.RandomState(settings.seed)
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(_widths(settings.width_divisor)):
        # Skipped, because torch's own initialization would advance the global random stream for nothing.
        layer: nn.Linear = nn.utils.skip_init(nn.Linear, width_in, width_out, bias=False)
        with torch.no_grad():
            layer.weight.copy_(_initial_weight(stream, width_out, width_in))
        if settings.weight_norm:
            parametrizations.weight_norm(layer)
        layers += [layer, _ACTIVATIONS[settings.nonlinearity]()]
    return nn.Sequential(*layers)


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over images of half the squared error summed over pixels: (N, 784), (N, 784) -> scalar."""
    return (output - target).square().sum() / (2 * target.shape[0])


class Problem:
    """The data and loss of one run, shared by all contestants; nothing in it changes during the run.

    Attributes:
        settings: What was asked for.
        train: Training images (images, 784).
        test: Test images (images, 784).
        digits: One image of each digit, from 0 to 9, among those that no run trains on (10, 784).
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        images, labels = mnist.embedded()
        self.train = images[: settings.images].clone()
        self.test = images[ARTICLE_IMAGES : ARTICLE_IMAGES + settings.images].clone()
        first = [int((labels[ARTICLE_IMAGES:] == digit).nonzero()[0]) for digit in range(10)]
        self.digits = images[ARTICLE_IMAGES:][first]

    def batch(self, step: int) -> Tensor:
        """The images that every contestant sees at its step number ``step`` (0-based): (batch, 784).

        Minibatches are a fresh permutation each epoch. It depends on the seed and the epoch alone, so every contestant
        sees the same order, and a resumed run has no generator to restore.
        """
        if self.settings.is_full_batch:
            return self.train
        epoch, position = divmod(step, self.settings.batches_per_epoch)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(self.settings.images, generator=generator)
        size = self.settings.batch_size or self.settings.images
        return self.train[order[position * size : (position + 1) * size]]

    def test_loss(self, model: nn.Module) -> float:
        """The loss on the test images."""
        with torch.no_grad():
            return half_squared_error(model(self.test), self.test).item()


def _widths(divisor: int) -> list[int]:
    hidden, code = HIDDEN // divisor, CODE // divisor
    return [PIXELS, hidden, hidden, hidden, code, hidden, hidden, hidden, PIXELS]


def _initial_weight(stream: np.random.RandomState, width_out: int, width_in: int) -> Tensor:
    """Uniform in +-sqrt(6 / (in + out + 1)), row-major (out, in), rounded to float32 as the article's weights were."""
    bound = math.sqrt(6 / (width_in + width_out + 1))
    uniform = stream.random_sample(width_out * width_in) * 2 * bound - bound
    return torch.from_numpy(uniform.reshape(width_out, width_in).astype(np.float32))
