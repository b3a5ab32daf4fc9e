"""Several processes on this machine, joined by gloo, that run a function of a test."""

import os
import pathlib
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def run(function: Callable[..., Any], size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """What ``function(*args)`` returned on each of ``size`` ranks, but for those that left; errors are raised here.

    Args:
        function: Importable.
        size: Number of ranks.
        *args: Of the function.
        timeout: After so many seconds a message that does not come is an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_enter, (function, size, folder, timeout, args), size)
        written = [path for rank in range(size) if (path := pathlib.Path(folder, str(rank))).exists()]
        return [torch.load(path, weights_only=False) for path in written]


def _enter(
    rank: int, function: Callable[..., Any], size: int, folder: str, timeout: float, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    try:
        torch.save(function(*args), os.path.join(folder, str(rank)))
    finally:
        dist.destroy_process_group()
    os._exit(0)  # as a process exits, torch's threads abort now and then, with any optimizer
