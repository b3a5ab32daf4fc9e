"""Cost of a K-FAC step over a plain one, on the article's network at full size: `python benchmarks/step_cost.py`.

Three contestants take turns, so that the machine's noise hits all alike: SGD; SGD behind a `Preconditioner` with new
factors and inverses at every step; and `KFAC` with its defaults, which chooses its rate. Prints seconds, ratios of
medians, and where the time of one `KFAC` step goes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

import natgrad
from natgrad.experiments.autoencoder import Problem, half_squared_error, network
from natgrad.experiments.settings import Settings
from natgrad.likelihoods import Gaussian

Step = Callable[[], None]


def contestants(settings: Settings) -> dict[str, Step]:
    """One step of each, on its own copy of the network."""
    x = Problem(settings).train

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, before: Step) -> Step:
        def run() -> None:
            optimizer.zero_grad()
            half_squared_error(model(x), x).backward()
            before()
            optimizer.step()

        return run

    plain, preconditioned, whole = (network(settings) for _ in range(3))
    preconditioner = natgrad.Preconditioner(preconditioned, Gaussian("batchmean"))
    return {
        "SGD": step(plain, torch.optim.SGD(plain.parameters(), lr=0.01), lambda: None),
        "Preconditioner + SGD": step(
            preconditioned, torch.optim.SGD(preconditioned.parameters(), lr=0.01), lambda: preconditioner.step() or None
        ),
        "KFAC": step(whole, natgrad.KFAC(whole, Gaussian("batchmean")), lambda: None),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width-divisor", type=int, default=1)
    parser.add_argument("--images", type=int, default=10_000)
    arguments = parser.parse_args()
    steps = contestants(Settings(width_divisor=arguments.width_divisor, images=arguments.images))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(arguments.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["SGD"])
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = f"{min(values):.2f}-{max(values):.2f}"
        print(f"{name:21} {median:6.2f} s a step ({spread}), {median / base:.2f} of SGD", flush=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        steps["KFAC"]()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=40))


if __name__ == "__main__":
    main()
