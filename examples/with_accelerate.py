"""natgrad with Accelerate: ``prepare`` wraps it as any optimizer, with accumulation, clipping and TensorBoard."""

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import natgrad


def main(folder: str) -> float:
    """Mean squared error on the training data, of variance 0.5, after ten epochs."""
    torch.manual_seed(0)
    x = torch.rand(1024, 4)
    y = torch.sin(4 * x[:, :1] + x[:, 1:2]) * x[:, 2:3].exp() / 2
    model = nn.Sequential(nn.Linear(4, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1))
    kfac = natgrad.KFAC(model, loss="mse")

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, log_with="tensorboard", project_dir=folder)
    accelerator.init_trackers("accelerate")
    loader = DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, kfac, loader)
    for _ in range(10):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(mse_loss(model(inputs), targets))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 10.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                accelerator.log(kfac.diagnostics(per_layer=False), step=kfac.preconditioner.steps)
    accelerator.end_training()
    with torch.no_grad():
        return float(mse_loss(model(x), y))


if __name__ == "__main__":
    print(f"mean squared error {main(sys.argv[1] if len(sys.argv) > 1 else 'runs/accelerate'):.5f}")
