"""``natgrad doctor``: is this machine set up to run K-FAC fast? Facts, a few measured rates, and what to change.

A K-FAC step is matrix products, which the plain step has too, and factorizations, which it has not. Both are timed here
on each device that torch sees, the latter by natgrad's own routines; nothing is trained.
"""

import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import natgrad
from natgrad.damping import Damping
from natgrad.experiments.runfolder import processor
from natgrad.inverses import INVERSES, Inverse

# Of the measured products and factors: a middling layer's, so that a laptop is done in a few seconds.
SIZE = 512
REPEATS = 3
DEFAULT_INVERSE = "cholesky"
WAIT_POLICY = "OMP_WAIT_POLICY"


def doctor(console: Console) -> None:
    """Print a table of facts, one of rates for each device, and advice."""
    _print(console, "This installation", facts())
    rates: dict[str, Mapping[str, float]] = {}
    for device in map(str, devices()):
        rates[device] = measure(torch.device(device))
        _print(console, f"Measured on {device}", shown(rates[device]))
    for line in advice(os.environ, rates, torch.get_num_threads(), os.cpu_count() or 1):
        console.print(f"- {line}", highlight=False)


def facts() -> dict[str, str]:
    """Versions, and what torch was built with."""
    build = dict(re.findall(r"(BLAS_INFO|LAPACK_INFO)=(\w+)", torch.__config__.show()))
    return {
        "natgrad": natgrad.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "BLAS, LAPACK": f"{build.get('BLAS_INFO', 'unknown')}, {build.get('LAPACK_INFO', 'unknown')}",
        "oneDNN": "yes" if torch.backends.mkldnn.is_available() else "no",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        WAIT_POLICY: os.environ.get(WAIT_POLICY, "not set"),
        "devices": ", ".join(map(str, devices())),
    }


def devices() -> list[torch.device]:
    """The processor, and the accelerator if there is one."""
    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return found if accelerator is None else [*found, accelerator]


def measure(device: torch.device) -> dict[str, float]:
    """Rates of products in Gflop/s, and milliseconds of each way to invert a layer's two factors; NaN if it cannot."""
    square = torch.randn(SIZE, SIZE, device=device)
    half = square.bfloat16()
    flops = 2 * SIZE**3 / 1e9
    rates = {
        "float32": flops / _seconds(lambda: square @ square),
        "bfloat16": flops / _seconds(lambda: half @ half),
    }
    factor = square @ square.T / SIZE
    for name, inverse in INVERSES.items():
        rates[name] = 1e3 * _seconds(partial(_factorize, inverse, factor))
    return rates


def _factorize(inverse: Inverse, factor: Tensor) -> Tensor:
    return next(iter(inverse.factorize(factor, factor, Damping(0.1, 0.1)).values()))


def shown(rates: Mapping[str, float]) -> dict[str, str]:
    """The rates with their units."""
    rows = {
        f"product of {SIZE}², float32": f"{rates['float32']:,.1f} Gflop/s",
        f"product of {SIZE}², bfloat16": f"{rates['bfloat16']:,.1f} Gflop/s, {_over(rates, 'bfloat16', 'float32')}",
    }
    for name in INVERSES:
        against = ", the default" if name == DEFAULT_INVERSE else f", {_over(rates, name, DEFAULT_INVERSE)}"
        rows[f'two factors of {SIZE}², inverse="{name}"'] = f"{rates[name]:,.1f} ms{against}"
    return rows


def _over(rates: Mapping[str, float], name: str, other: str) -> str:
    return f"{rates[name] / rates[other]:.2g} × {other}"


def advice(
    environment: Mapping[str, str], rates: Mapping[str, Mapping[str, float]], threads: int, processors: int
) -> list[str]:
    """What to change, most important first, by the rates of each device; one line that says so if nothing."""
    lines = []
    if environment.get(WAIT_POLICY, "").lower() != "passive":
        lines.append(
            f"Set {WAIT_POLICY}=passive before Python starts: threads that spin while they wait make small "
            "factorizations many times slower as soon as another process is busy."
        )
    if threads > processors:
        lines.append(f"torch uses {threads} threads on {processors} processors: set OMP_NUM_THREADS={processors}.")
    for device, rate in rates.items():
        if rate["bfloat16"] < rate["float32"]:
            lines.append(f"On {device}, train in float32: bfloat16 is emulated, and slower.")
        if rate["eigen"] > 5 * rate[DEFAULT_INVERSE]:
            lines.append(
                f'On {device}, keep inverse="cholesky", or give "eigen" and "ekfac" an inverse_period of 10 or more.'
            )
    return lines or ["Nothing to change."]


def _seconds(run: Callable[[], Tensor]) -> float:
    """The fastest of a few runs after one that does not count; NaN where the device lacks the routine."""
    try:
        run()
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            run().flatten()[0].item()  # waits for the device
            times.append(time.perf_counter() - start)
    except (RuntimeError, NotImplementedError):
        return float("nan")
    return min(times)


def _print(console: Console, title: str, rows: Mapping[str, str]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
