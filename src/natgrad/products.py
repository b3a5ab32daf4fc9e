"""Products of large float32 matrices at the speed of hardware that multiplies rounded numbers.

Tensor cores, and the tile units of some processors, multiply matrices several times faster if these are rounded first,
to the 11 digits of TensorFloat-32 or the 8 of bfloat16, while sums stay float32. That is enough where gradients are
averaged over batches and damping is automatic: there that of A is never below a third of its mean eigenvalue, and
second moments, lengths and natural gradients stay far nearer to the exact ones than two batches are to each other. With
lighter damping it is not: rounding along the few large eigenvalues of A, such as that of the mean input, would bury
what the small ones hold. No pass of the model is rounded.

That is for torch to know, and as soon as anybody has told it how to multiply float32 matrices, it stays as it is. Torch
knows it for the whole process: what other threads multiply in float32 while natgrad does is rounded, too.
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
    """a @ b, of rounded matrices where that is allowed and faster."""
    sides = a.shape[-2], a.shape[-1], b.shape[-1]
    pays = min(sides) >= LEAST_SIDE and sides[0] * sides[1] * sides[2] >= LEAST_WORK
    if not (pays and _allowed.get() and a.dtype == torch.float32):
        return a @ b
    on_gpu = a.device.type == "cuda"
    how = torch.backends.cuda.matmul if on_gpu else _CPU.matmul
    if how.fp32_precision != "none" or not (on_gpu or (a.device.type == "cpu" and _has_tiles())):
        return a @ b
    how.fp32_precision = "tf32" if on_gpu else "bf16"
    try:
        return a @ b
    finally:
        how.fp32_precision = "none"


def multiplies_as_stored() -> bool:
    """Whether processors multiply all digits of float32 matrices, which is so unless somebody has said otherwise."""
    return all(how.fp32_precision in ("none", "ieee") for how in (_CPU.matmul, _CPU.conv, _CPU.rnn))


@cache
def _has_tiles() -> bool:
    """Whether the processor has units for tiles of bfloat16; without, rounded products are slower than exact ones."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
