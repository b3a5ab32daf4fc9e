"""Networks in which K-FAC is exact, by why it is, and one network for every kind of layer in which it is not."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layer_modules import Attention, Conv1D, Loop, Repeated, Twins, normalized, randomized
from linear_cases import Halves, Mixed, Pooled, stack

ANY = ["mse", "mse-sum", "ce", "ce-sum", "bce", "bce-sum"]
SQUARED = ["mse", "mse-sum"]
Make = Callable[[bool], tuple[nn.Module, Tensor]]
"""From whether there are biases to a model and its input."""


@dataclass(frozen=True)
class Case:
    """Where K-FAC is exact.

    Attributes:
        make: A model and its input.
        losses: For which of them.
        sharing: With which weight sharing.
        layers: In which layers; all of them if None.
    """

    make: Make
    losses: list[str]
    sharing: str = "expand"
    layers: tuple[str, ...] | None = None


class Spread(nn.Module):
    """The output of a network as logits for three classes at several positions, (N, 3, T)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).unflatten(1, (3, -1))


class Apart(nn.Module):
    """A table whose rows, for one, are the output, and which, for another, is a head on something else."""

    def __init__(self, tokens: int = 5, dim: int = 3) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(tokens, dim), nn.Linear(dim, tokens, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("h", torch.randn(tokens, 2, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.embedding(x), self.head(self.h).flatten(1)], 1)


class TwoHeads(nn.Module):
    """Two modules with the same parameters, on the two halves of the input."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.twins = Twins(lambda: nn.Linear(3, 2, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.twins.first(x[:, :3]), self.twins.second(x[:, 3:])], 1)


class Recurrence(nn.Module):
    """A recurrent module and a head at every step, (N, T, ·) → (N, 3, T); or at the last."""

    def __init__(self, recurrent: nn.RNNBase, last: bool = False) -> None:
        super().__init__()
        self.recurrent, self.last = recurrent, last
        self.head = nn.Linear(recurrent.hidden_size * (2 if recurrent.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.recurrent(x)[0]
        return self.head(h[:, -1]) if self.last else self.head(h).transpose(1, 2)


class Transposed(nn.Module):
    """(N, T, C) → (N, C, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def before(module: nn.Module, width: int) -> nn.Sequential:
    """A module with one position, and a curved network behind it that ends in three logits."""
    return nn.Sequential(module, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3))


def one(make: Callable[[bool], nn.Module], width: int, *shape: int) -> Case:
    """A single datum at which the module has a single position: any loss, any activation."""
    return Case(lambda bias: (before(make(bias), width), torch.randn(1, *shape)), ANY)


def straight(make: Callable[[bool], nn.Module], *shape: int, sharing: str = "expand") -> Case:
    """Several data in a linear network: squared errors only."""
    return Case(lambda bias: (make(bias), torch.randn(*shape)), SQUARED, sharing)


def norm(make: Callable[[], nn.Module], *shape: int) -> Case:
    """Scale and shift, whose block is exact for any batch and loss."""

    def network(bias: bool) -> tuple[nn.Module, Tensor]:
        body = nn.Sequential(nn.Linear(shape[-1], shape[-1], bias=bias), randomized(make()), nn.Tanh(), nn.Flatten())
        return nn.Sequential(*body, nn.LazyLinear(3)), torch.randn(*shape)

    return Case(network, ANY, layers=("1",))


EXACT: dict[str, Case] = {
    # One datum, one position.
    "one datum": Case(lambda bias: (stack([3, 4, 5, 3], bias=bias), torch.randn(1, 3)), ANY),
    "one datum, in-place ReLU": Case(
        lambda bias: (
            nn.Sequential(nn.Linear(3, 6, bias=bias), nn.ReLU(inplace=True), nn.Linear(6, 3)),
            torch.randn(1, 3),
        ),
        ANY,
    ),
    "one datum, in-place activation behind a convolution": Case(
        lambda bias: (
            nn.Sequential(nn.Conv2d(2, 6, 3, bias=bias), nn.LeakyReLU(0.2, True), nn.Flatten(), nn.Linear(6, 3)),
            torch.randn(1, 2, 3, 3),
        ),
        ANY,
    ),
    "one datum, logits at two positions": Case(
        lambda bias: (Spread(stack([3, 4, 6], bias=bias)), torch.randn(1, 3)), ANY
    ),
    "one datum, weight norm": one(lambda bias: normalized(nn.Linear(3, 4, bias=bias)), 4, 3),
    "one datum, Conv1D of transformers": one(lambda bias: Conv1D(4, 3), 4, 3),
    "one datum, dropout in eval mode": Case(
        lambda bias: (
            nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)).eval(),
            torch.randn(1, 3),
        ),
        ANY,
    ),
    "full kernel, 1d": one(lambda bias: nn.Conv1d(2, 3, 4, bias=bias), 3, 2, 4),
    "full kernel, 2d": one(lambda bias: nn.Conv2d(2, 3, (3, 2), bias=bias), 3, 2, 3, 2),
    "full kernel, 3d": one(lambda bias: nn.Conv3d(2, 3, (2, 1, 2), bias=bias), 3, 2, 2, 1, 2),
    "1×1 convolution on one pixel": one(lambda bias: nn.Conv2d(3, 4, 1, bias=bias), 4, 3, 1, 1),
    "padding": one(lambda bias: nn.Conv2d(2, 3, 3, padding=(1, 0), bias=bias), 3, 2, 1, 3),
    "stride": one(lambda bias: nn.Conv2d(2, 3, 2, stride=3, bias=bias), 3, 2, 4, 3),
    "stride and padding": one(lambda bias: nn.Conv1d(2, 3, 3, stride=4, padding=1, bias=bias), 3, 2, 4),
    "dilation": one(lambda bias: nn.Conv2d(2, 3, 2, dilation=(2, 3), bias=bias), 3, 2, 3, 4),
    "groups": one(lambda bias: nn.Conv2d(4, 6, 2, groups=2, bias=bias), 6, 4, 2, 2),
    "depthwise": one(lambda bias: nn.Conv1d(4, 8, 3, groups=4, bias=bias), 8, 4, 3),
    "same": one(lambda bias: nn.Conv2d(2, 3, (3, 5), padding="same", bias=bias), 3, 2, 1, 1),
    "circular padding": one(
        lambda bias: nn.Conv1d(2, 3, 3, stride=4, padding=1, padding_mode="circular", bias=bias), 3, 2, 3
    ),
    "reflected padding": one(
        lambda bias: nn.Conv2d(2, 3, 3, stride=4, padding=1, padding_mode="reflect", bias=bias), 3, 2, 3, 4
    ),
    "replicated padding": one(
        lambda bias: nn.Conv1d(2, 3, 5, stride=9, padding=2, padding_mode="replicate", bias=bias), 3, 2, 3
    ),
    "transposed": one(lambda bias: nn.ConvTranspose2d(2, 3, 3, padding=1, bias=bias), 3, 2, 1, 1),
    "transposed, stride and groups": one(
        lambda bias: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=2, groups=2, bias=bias), 6, 4, 2
    ),
    "one token": Case(lambda bias: (before(nn.Embedding(5, 4), 4), torch.tensor([[3]])), ANY),
    "one token and padding": Case(
        lambda bias: (before(nn.Embedding(5, 4, padding_idx=2), 12), torch.tensor([[2, 3, 2]])), ANY, layers=("0",)
    ),
    # Linear networks with several data.
    "linear network": straight(lambda bias: stack([3, 4, 2], nn.Identity, bias), 5, 3),
    "linear network, eval batch norm between layers": Case(
        lambda bias: (
            nn.Sequential(nn.Linear(3, 4, bias=bias), randomized(nn.BatchNorm1d(4)).eval(), nn.Linear(4, 2, bias=bias)),
            torch.randn(5, 3),
        ),
        SQUARED,
    ),
    "convolution with full kernel": straight(
        lambda bias: nn.Sequential(nn.Conv2d(2, 3, 2, bias=bias), nn.Flatten(), nn.Linear(3, 2)), 5, 2, 2, 2
    ),
    "1×1 convolutions on one pixel": straight(
        lambda bias: nn.Sequential(nn.Conv2d(2, 3, 1, bias=bias), nn.Conv2d(3, 2, 1, bias=bias)), 5, 2, 1, 1
    ),
    "positions that do not interact": straight(
        lambda bias: nn.Sequential(nn.Conv2d(2, 3, 2, bias=bias), nn.Conv2d(3, 2, 1, bias=bias)), 4, 2, 3, 4
    ),
    "positions that do not interact, eval batch norm": straight(
        lambda bias: nn.Sequential(
            nn.Conv1d(2, 3, 2, padding=1, bias=bias), randomized(nn.BatchNorm1d(3)).eval(), nn.Conv1d(3, 2, 1)
        ),
        4,
        2,
        5,
    ),
    "groups whose positions do not interact": straight(
        lambda bias: nn.Sequential(nn.Conv1d(4, 6, 2, groups=2, stride=2, bias=bias), nn.Conv1d(6, 2, 1)), 4, 4, 6
    ),
    "positions of Linear that do not interact": straight(lambda bias: stack([3, 4, 2], nn.Identity, bias), 4, 2, 5, 3),
    "mean over positions": straight(
        lambda bias: nn.Sequential(nn.Conv2d(2, 3, 2, bias=bias), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        4,
        2,
        3,
        4,
        sharing="reduce",
    ),
    "mean over positions, two layers": straight(
        lambda bias: nn.Sequential(
            nn.Conv2d(2, 3, 2, padding=1, bias=bias), nn.Conv2d(3, 2, 1, bias=bias), nn.AdaptiveAvgPool2d(1)
        ),
        4,
        2,
        3,
        4,
        sharing="reduce",
    ),
    "sum over positions": straight(
        lambda bias: Pooled(stack([3, 4, 2], nn.Identity, bias), "sum"), 4, 5, 3, sharing="reduce"
    ),
    "sum over positions, transposed, groups": straight(
        lambda bias: nn.Sequential(
            nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2, bias), nn.AdaptiveAvgPool1d(1), nn.Flatten()
        ),
        4,
        4,
        5,
        sharing="reduce",
    ),
    "sum over tokens of which one is padding": Case(
        lambda bias: (Pooled(nn.Embedding(5, 3, padding_idx=2), "sum"), PADDED), SQUARED, "reduce"
    ),
    "called twice, not interacting": straight(lambda bias: Halves(), 5, 6),
    "twins that do not interact": straight(lambda bias: TwoHeads(bias), 5, 6),
    "tied to an embedding that does not interact": Case(
        lambda bias: (Apart(), torch.randperm(5)), SQUARED, layers=("head",)
    ),
    # Last layers of any network.
    "last layer": Case(lambda bias: (stack([3, 4, 2], bias=bias), torch.randn(5, 3)), SQUARED, layers=("2",)),
    "last layer, positions": Case(
        lambda bias: (stack([3, 4, 2], bias=bias), torch.randn(5, 6, 3)), SQUARED, layers=("2",)
    ),
    "last convolution": Case(
        lambda bias: (
            nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(True), nn.Conv2d(3, 4, 3, 2, 1, bias=bias)),
            torch.randn(4, 2, 5, 6),
        ),
        SQUARED,
        layers=("2",),
    ),
    "last transposed convolution": Case(
        lambda bias: (
            nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.ConvTranspose2d(3, 2, 2, 2, bias=bias)),
            torch.randn(4, 2, 3, 3),
        ),
        SQUARED,
        layers=("2",),
    ),
    "embedding as the last layer": Case(lambda bias: (nn.Sequential(nn.Embedding(5, 3)), TOKENS), SQUARED),
    "head over attention": Case(
        lambda bias: (nn.Sequential(Attention(4, batch_first=True), nn.Linear(4, 2, bias=bias)), torch.randn(3, 5, 4)),
        SQUARED,
        layers=("1",),
    ),
    # Scale and shift.
    "layer norm": norm(lambda: nn.LayerNorm(4), 5, 4),
    "layer norm, positions": norm(lambda: nn.LayerNorm(4), 5, 3, 4),
    "layer norm, two axes": norm(lambda: nn.LayerNorm((3, 4)), 5, 2, 3, 4),
    "rms norm": norm(lambda: nn.RMSNorm(4), 5, 3, 4),
    "group norm": norm(lambda: nn.GroupNorm(2, 4), 3, 4, 2, 3),
    "eval batch norm": norm(lambda: nn.BatchNorm2d(3).eval(), 4, 3, 2, 2),
    "eval batch norm, vectors": norm(lambda: nn.BatchNorm1d(4).eval(), 5, 4),
}
PADDED = torch.tensor([[3, 2, 2], [4, 2, 4], [1, 1, 1]])  # one token each
TOKENS = torch.tensor([[0, 3, 1], [3, 3, 4]])


def tokens(*shape: int) -> Tensor:
    return torch.randint(7, shape)


def headed(body: nn.Module, *shape: int, width: int) -> tuple[nn.Module, Tensor]:
    """Positions meet in a head behind a curve."""
    return nn.Sequential(body, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)), torch.randn(*shape)


NOT_EXACT: dict[str, Make] = {
    "linear, positions": lambda bias: (Mixed(), torch.randn(3, 4, 3)),
    "linear, repeated": lambda bias: (
        nn.Sequential(Repeated(nn.Linear(3, 3, bias=bias)), nn.Linear(3, 3)),
        torch.randn(4, 3),
    ),
    "linear, twins": lambda bias: (
        nn.Sequential(Twins(lambda: nn.Linear(3, 3, bias=bias)), nn.Tanh(), nn.Linear(3, 3)),
        torch.randn(4, 3),
    ),
    "linear, weight norm": lambda bias: headed(normalized(nn.Linear(3, 4, bias=bias)), 4, 2, 3, width=8),
    "Conv1D of transformers": lambda bias: headed(Conv1D(4, 3), 4, 2, 3, width=8),
    "conv1d": lambda bias: headed(nn.Conv1d(2, 3, 3, 2, 1, bias=bias), 4, 2, 5, width=9),
    "conv1d, same, circular": lambda bias: headed(
        nn.Conv1d(2, 3, 3, padding="same", padding_mode="circular", bias=bias), 4, 2, 4, width=12
    ),
    "conv2d": lambda bias: headed(nn.Conv2d(2, 3, (2, 3), padding=(0, 1), bias=bias), 4, 2, 3, 4, width=24),
    "conv2d, dilation": lambda bias: headed(nn.Conv2d(2, 3, 2, 2, 1, 2, bias=bias), 4, 2, 4, 3, width=12),
    "conv2d, weight norm": lambda bias: headed(normalized(nn.Conv2d(2, 3, 2, bias=bias)), 4, 2, 3, 3, width=12),
    "conv2d, repeated": lambda bias: headed(Repeated(nn.Conv2d(2, 2, 3, padding=1, bias=bias)), 3, 2, 2, 2, width=8),
    "conv3d": lambda bias: headed(nn.Conv3d(2, 3, 2, bias=bias), 3, 2, 3, 2, 3, width=12),
    "grouped": lambda bias: headed(nn.Conv2d(4, 6, 2, groups=2, bias=bias), 4, 4, 3, 3, width=24),
    "depthwise": lambda bias: headed(nn.Conv2d(3, 6, 3, padding=1, groups=3, bias=bias), 4, 3, 3, 2, width=36),
    "transposed, 1d": lambda bias: headed(nn.ConvTranspose1d(2, 3, 3, 2, 1, 1, bias=bias), 4, 2, 3, width=18),
    "transposed, 2d, grouped": lambda bias: headed(
        nn.ConvTranspose2d(4, 2, 2, 2, groups=2, bias=bias), 4, 4, 2, 2, width=32
    ),
    "transposed, 3d": lambda bias: headed(nn.ConvTranspose3d(2, 2, 2, bias=bias), 3, 2, 1, 2, 1, width=24),
    "embedding": lambda bias: (before(nn.Embedding(7, 2), 8), tokens(5, 4)),
    "embedding, padding": lambda bias: (before(nn.Embedding(7, 2, padding_idx=1), 8), tokens(5, 4)),
    "attention": lambda bias: (
        nn.Sequential(Attention(4, bias=bias, batch_first=True), nn.Linear(4, 3), Transposed()),
        torch.randn(3, 4, 4),
    ),
    "attention, mean at the end": lambda bias: (
        Pooled(nn.Sequential(nn.Linear(3, 4), Attention(4, bias=bias, batch_first=True), nn.Linear(4, 3)), "mean"),
        torch.randn(3, 4, 3),
    ),
    "LSTM": lambda bias: (Recurrence(nn.LSTM(2, 3, batch_first=True, bias=bias)), torch.randn(4, 3, 2)),
    "LSTM, two layers, both ways": lambda bias: (
        Recurrence(nn.LSTM(2, 2, 2, batch_first=True, bias=bias, bidirectional=True)),
        torch.randn(3, 3, 2),
    ),
    "GRU": lambda bias: (Recurrence(nn.GRU(2, 3, batch_first=True, bias=bias), last=True), torch.randn(4, 3, 2)),
    "RNN": lambda bias: (Recurrence(nn.RNN(2, 3, batch_first=True, bias=bias)), torch.randn(4, 3, 2)),
    "LSTM cell": lambda bias: (
        nn.Sequential(Loop(nn.LSTMCell(2, 3, bias=bias), 3), nn.Linear(3, 3)),
        torch.randn(4, 3, 2),
    ),
    "GRU cell": lambda bias: (
        nn.Sequential(Loop(nn.GRUCell(2, 3, bias=bias), 3), nn.Linear(3, 3)),
        torch.randn(4, 3, 2),
    ),
}
