"""natgrad in Lightning: ``configure_optimizers`` returns it, and the scalars of ``diagnostics`` go to TensorBoard.

Lightning zeroes gradients between forward and backward pass and gives every step a closure; both are fine.
"""

import sys

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import natgrad


class Classifier(lightning.LightningModule):
    """Which of three noisy spirals a point belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The model that natgrad watches is called here, as a whole."""
        x, y = batch
        return cross_entropy(self.net(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Lightning switches gradients off here, and natgrad then looks away."""
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), prog_bar=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The whole of natgrad in Lightning."""
        return natgrad.KFAC(self.net, loss="cross_entropy")

    def on_train_batch_end(self, *_: object) -> None:
        """Lightning's logger takes plain numbers."""
        optimizer = self.optimizers().optimizer
        self.log_dict({f"kfac/{key}": value for key, value in optimizer.diagnostics(per_layer=False).items()})


def spirals(count: int, seed: int) -> TensorDataset:
    """Points (count, 2) and which spiral they are from."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (count,), generator=generator)
    radius = torch.rand(count, generator=generator)
    angle = 5 * radius + y * (2 * torch.pi / 3) + 0.1 * torch.randn(count, generator=generator)
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], 1), y)


def main(folder: str) -> float:
    """Accuracy on points not seen, after eight epochs."""
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_epochs=8,
        accelerator="cpu",
        logger=TensorBoardLogger(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=10.0,
    )
    train = DataLoader(spirals(1500, seed=0), batch_size=250, shuffle=True)
    trainer.fit(Classifier(), train, DataLoader(spirals(500, seed=1), batch_size=500))
    return float(trainer.callback_metrics["accuracy"])


if __name__ == "__main__":
    print(f"accuracy {main(sys.argv[1] if len(sys.argv) > 1 else 'runs/lightning'):.2f}")
