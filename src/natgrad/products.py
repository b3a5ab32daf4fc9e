"""Products of large float32 matrices at the speed of hardware that multiplies rounded numbers.

Tensor cores, and the newer units of processors, multiply matrices of bfloat16, with sums in float32, several times
faster than those of float32. Its 8 digits are enough for the lengths that tell the noise of gradients, and for
natural gradients where these are averaged over batches and damping is automatic: there that of A is never below a third
of its mean eigenvalue, and they stay far nearer to the exact ones than two batches are to each other. With lighter
damping it is not: rounding along the few large eigenvalues of A, such as that of the mean input, would bury what the
small ones hold. Second moments are never rounded, as they would not stay positive, nor are passes of the model; and as
soon as anybody has told torch how to multiply float32 matrices, nothing is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Smaller ones take longer to hand over than to multiply: the least side, and the product of all three.
LEAST_SIDE, LEAST_WORK = 64, 2**22
_CPU: Any = torch.backends.mkldnn  # of whose settings the stubs know nothing
_GPU: Any = torch.backends.cuda
_allowed = ContextVar("allowed", default=False)


@contextmanager
def rounding(allowed: bool) -> Iterator[None]:
    """In here, :func:`product` may round."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, rounded where that is allowed and faster."""
    sides = a.shape[-2], a.shape[-1], b.shape[-1]
    pays = min(sides) >= LEAST_SIDE and sides[0] * sides[1] * sides[2] >= LEAST_WORK
    if pays and _allowed.get() and a.dtype == torch.float32 and not _is_told(a.device.type) and _has_units(a.device):
        return (a.bfloat16() @ b.bfloat16()).float()
    return a @ b


def multiplies_as_stored() -> bool:
    """Whether processors multiply all digits of float32 matrices, which is so unless somebody has said otherwise."""
    return all(how.fp32_precision in ("none", "ieee") for how in (_CPU.matmul, _CPU.conv, _CPU.rnn))


def _is_told(device: str) -> bool:
    """Whether somebody has said how to multiply."""
    return bool((_GPU if device == "cuda" else _CPU).matmul.fp32_precision != "none")


@cache
def _has_units(device: torch.device) -> bool:
    """Whether the device has units for bfloat16; without, rounded products are slower than exact ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    can = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(can.get("amx_bf16") or can.get("avx512_bf16"))
