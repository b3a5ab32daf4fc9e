"""Small networks as people write them, unmodified for natgrad, with batches that they can learn."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad.experiments import mnist

TOKENS, LENGTH = 65, 16


class Task(NamedTuple):
    """A network and what it is to learn.

    Attributes:
        model: The network.
        loss: As natgrad is told it.
        x: Inputs.
        y: Targets.
    """

    model: nn.Module
    loss: nn.Module
    x: Tensor
    y: Tensor


class Residual(nn.Module):
    """A block of He et al. (2015), with in-place activations."""

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width != out:
            self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class GPT(nn.Module):
    """A language model of pre-norm transformer blocks whose head shares the embedding's weight; (N, C, T)."""

    def __init__(self, width: int = 24, blocks: int = 2) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(TOKENS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True, norm_first=True)
            for _ in range(blocks)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, TOKENS, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        return self.head(self.norm(h)).transpose(1, 2)


class ViT(nn.Module):
    """Patches, a class token and a learned position: the last two are parameters of no layer."""

    def __init__(self, width: int = 16, patch: int = 7) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.position
        return self.head(self.norm(self.block(h))[:, 0])


class LanguageLSTM(nn.Module):
    """(N, T) → (N, C, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(TOKENS, 16), nn.LSTM(16, 24, batch_first=True)
        self.head = nn.Linear(24, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0]).transpose(1, 2)


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a connection across."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.up, self.leave = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = functional.relu(self.enter(x))
        b = functional.relu(self.down(a))
        return self.leave(torch.cat([a, functional.relu(self.up(b))], 1))


def separable() -> nn.Module:
    """Depthwise convolutions, each with a 1×1 convolution behind it."""
    return nn.Sequential(
        *[nn.Conv2d(1, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU()],
        *[nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 32, 1), nn.ReLU(inplace=True)],
        *[nn.Conv2d(32, 32, 3, 2, 1, groups=32), nn.Conv2d(32, 32, 1), nn.ReLU(inplace=True)],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)],
    )


def resnet() -> nn.Module:
    """Two stages."""
    stem = [nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    return nn.Sequential(
        *stem, Residual(8, 8), Residual(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Images, (N, 1, 28, 28), and labels."""
    images, classes = mnist.embedded()
    return images[:count].reshape(-1, 1, 28, 28), classes[:count].long()


def text() -> tuple[Tensor, Tensor]:
    """Sequences, and a function of each token."""
    tokens = torch.randint(TOKENS, (32, LENGTH))
    return tokens, (3 * tokens + 1) % TOKENS


def noisy(count: int) -> tuple[Tensor, Tensor]:
    """Images with noise, and without."""
    images = digits(count)[0]
    return images + 0.3 * torch.randn_like(images), images


TASKS: dict[str, Callable[[], Task]] = {
    "ResNet": lambda: Task(resnet(), nn.CrossEntropyLoss(), *digits(96)),
    "GPT": lambda: Task(GPT(), nn.CrossEntropyLoss(), *text()),
    "ViT": lambda: Task(ViT(), nn.CrossEntropyLoss(), *digits(96)),
    "LSTM": lambda: Task(LanguageLSTM(), nn.CrossEntropyLoss(), *text()),
    "depthwise separable": lambda: Task(separable(), nn.CrossEntropyLoss(), *digits(96)),
    "U-Net": lambda: Task(UNet(), nn.BCEWithLogitsLoss(), *noisy(16)),
}
