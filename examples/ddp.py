"""K-FAC on several processes: the training loop is that of DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py

Each rank sends its own part of every batch through the wrapped model, and natgrad takes the ranks from the wrapper. To
keep the inverses of a layer on one rank only, pass ``natgrad.Distributed(model, inverses="memory")`` instead of the
model.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import natgrad

STEPS, DATA = 20, 64


def main() -> None:
    """Train a small network on the sign of a product, and print the loss of all ranks."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same network everywhere; DistributedDataParallel would see to it as well
    model = DistributedDataParallel(nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1)))
    optimizer = natgrad.KFAC(model, loss="bce_with_logits")
    if rank == 0:
        print(natgrad.describe(model))
    generator = torch.Generator().manual_seed(rank)  # other data on every rank
    for step in range(STEPS):
        x = torch.randn(DATA // ranks, 2, generator=generator)
        y = (x.prod(dim=1, keepdim=True) > 0).float()
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
        loss.backward()
        optimizer.step()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step:2d}  loss {float(mean):.3f}  traffic {optimizer.diagnostics()['traffic']:.0f} B")
    dist.barrier()  # no rank leaves while another still writes
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
