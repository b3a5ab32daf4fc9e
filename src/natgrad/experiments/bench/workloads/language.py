"""A small GPT that predicts the next character of Shakespeare's plays."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad.experiments.bench.workload import Batch, Workload, evaluating, seeded
from natgrad.experiments.download import fetch

ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FILE = "tinyshakespeare.txt"
BATCH, LENGTH, HEADS = 32, 64, 4


class Block(nn.Module):
    """Causal attention and a two-layer perceptron, each behind a LayerNorm and beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        """(N, T, width) → (N, T, width)."""
        n, t, width = h.shape
        q, k, v = self.qkv(self.norm1(h)).reshape(n, t, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.project(attended.transpose(1, 2).reshape(n, t, width))
        out: Tensor = h + self.mlp(self.norm2(h))
        return out


class GPT(nn.Module):
    """Characters (N, T) → logits (N, characters, T)."""

    def __init__(self, characters: int, width: int, blocks: int, length: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(characters, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # GPT-2's initialization, the residual branches scaled by their number
                last = name.endswith(("project.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * blocks) ** 0.5 if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, characters: Tensor) -> Tensor:
        """(N, T) → (N, characters, T)."""
        h = self.embedding(characters) + self.position(torch.arange(characters.shape[1]))
        logits: Tensor = self.head(self.norm(self.blocks(h)))
        return logits.transpose(1, 2)


def shakespeare() -> str:
    """The text, fetched on first use and cached.

    Raises:
        DownloadError: It is neither cached nor to be had.
    """
    without = "Without it, `natgrad bench` runs every workload but gpt."
    return fetch(FILE, [ADDRESS], f"sha256:{SHA256}", without).read_text()


def gpt(name: str, seconds: float, text: str | None = None, width: int = 64, blocks: int = 2) -> Workload:
    """The first 90% of the text to train on, windows of 64 characters in batches of 32; the rest to test.

    Args:
        name: Of the workload.
        seconds: Training time of a run.
        text: In place of Shakespeare's.
        width: Of the hidden states.
        blocks: Number of them.

    Raises:
        DownloadError: As `shakespeare`.
    """
    text = shakespeare() if text is None else text
    alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
    data = torch.tensor([alphabet[character] for character in text])
    split = len(data) * 9 // 10
    train, test = data[:split], data[split:]
    held_out = test[: (len(test) - 1) // LENGTH * LENGTH + 1]
    x, y = held_out[:-1].reshape(-1, LENGTH)[::4], held_out[1:].reshape(-1, LENGTH)[::4]

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(train) - LENGTH, (BATCH,), generator=generator)
            windows = train[starts[:, None] + torch.arange(LENGTH + 1)]
            yield windows[:, :-1], windows[:, 1:]

    def evaluate(model: nn.Module) -> dict[str, float]:
        logits = torch.cat([model(part) for part in x.split(128)])
        return {"loss": functional.cross_entropy(logits, y).item()}

    return Workload(
        name=name,
        title=f"GPT, {blocks} layers of width {width}, {BATCH}x{LENGTH} characters of Shakespeare",
        model=seeded(lambda: GPT(len(alphabet), width, blocks, LENGTH)),
        batches=batches,
        loss=functional.cross_entropy,
        natgrad_loss="cross_entropy",
        evaluate=evaluating(evaluate),
        seconds=seconds,
        sequence=True,
    )
