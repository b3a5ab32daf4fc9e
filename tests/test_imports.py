"""What `import natgrad` asks of torch: neither its slowest parts, nor those that some builds lack."""

import subprocess
import sys

# `torch.distributed` tells whether it was built by whether these are there.
WITHOUT = """
import importlib.abc, sys

class Build(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch.distributed":
            for part in ("_c10d_init", "_rpc_init", "_dist_autograd_init"):
                delattr(sys.modules["torch._C"], part)

sys.meta_path.insert(0, Build())
import torch
assert not torch.distributed.is_available()
"""
TRAINING = """
import natgrad
from torch import nn
for inverses in ("comm", "memory"):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    before = [p.clone() for p in model.parameters()]
    print(natgrad.describe(model))
    optimizer = natgrad.KFAC(natgrad.Distributed(model, inverses), loss="mse")
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(torch.ones(8, 3)), torch.zeros(8, 2)).backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_natgrad_imports_nothing_slow() -> None:
    """Sharded tensors bring sympy along, and half as much time again as torch alone."""
    loaded = run("import natgrad, sys; print(*sys.modules)").split()
    slow = ("torch.distributed.fsdp", "torch.distributed.tensor", "sympy")
    assert "natgrad.distributed" in loaded
    assert [name for name in loaded if name.startswith(slow)] == []


def test_a_build_of_torch_without_distributed_trains() -> None:
    run(WITHOUT + TRAINING)
