"""A training that is killed at random moments and goes on from its newest checkpoint; run as a script.

    python killed.py FOLDER KILLS SEED

Children are forked from a process that has loaded torch and computed nothing. Each goes on from the newest checkpoint
and saves one after every step, until it is killed: at a random moment after it has saved at least one.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import natgrad
from natgrad import checkpoint


class Training:
    """Minibatches, momentum, everything automatic, and a scheduler; the data of a step depend on its number alone."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3))
        self.optimizer = natgrad.KFAC(self.model, "cross_entropy")
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.99)
        self.step_number = 0

    def step(self) -> None:
        generator = torch.Generator().manual_seed(self.step_number)
        x, y = torch.randn(20, 6, generator=generator), torch.randint(3, (20,), generator=generator)
        self.optimizer.zero_grad()
        cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step_number += 1

    def state_dict(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {"step": self.step_number, **{name: part.state_dict() for name, part in parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_number = state["step"]


def train_forever(folder: Path) -> None:
    training = Training()
    if any(folder.glob("*.pt")):
        training.load_state_dict(checkpoint.load_newest(folder))
    while True:
        training.step()
        checkpoint.save(training.state_dict(), folder / f"{training.step_number:09d}.pt")
        for old in sorted(folder.glob("*.pt"))[:-2]:
            old.unlink(missing_ok=True)


def newest(folder: Path) -> str:
    return max((path.name for path in folder.glob("*.pt")), default="")


def main(folder: Path, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(kills):
        before = newest(folder)
        child = os.fork()
        if child == 0:
            train_forever(folder)
        while newest(folder) == before:
            if os.waitpid(child, os.WNOHANG)[0]:
                raise SystemExit("a child failed")
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(newest(folder), os.WTERMSIG(status), len(list(folder.glob(".*.tmp"))), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
