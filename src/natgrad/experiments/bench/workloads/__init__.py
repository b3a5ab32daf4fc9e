"""The workloads, by name. Each is built when it is asked for, as building one reads its data."""

from collections.abc import Callable

from natgrad.experiments.bench.workload import Workload
from natgrad.experiments.bench.workloads.autoencoders import article, classical
from natgrad.experiments.bench.workloads.classifiers import convnet, mlp
from natgrad.experiments.bench.workloads.language import gpt
from natgrad.experiments.bench.workloads.physics import poisson
from natgrad.experiments.bench.workloads.regression import linear
from natgrad.experiments.settings import Settings, SettingsError

# Seconds are for one core of 2020 or later: a few hundred steps of the slowest contestant.
WORKLOADS: dict[str, Callable[[], Workload]] = {
    "autoencoder": lambda: article("autoencoder", 180, Settings()),
    "autoencoder-relu": lambda: article("autoencoder-relu", 180, Settings(nonlinearity="relu")),
    "autoencoder-quarter": lambda: article("autoencoder-quarter", 60, Settings(width_divisor=4, images=2_500)),
    "autoencoder-quarter-relu": lambda: article(
        "autoencoder-quarter-relu", 60, Settings(width_divisor=4, images=2_500, nonlinearity="relu")
    ),
    "autoencoder-weightnorm": lambda: article(
        "autoencoder-weightnorm", 120, Settings(nonlinearity="relu", weight_norm=True, batch_size=500)
    ),
    "classical": lambda: classical("classical", 180),
    "classical-60k": lambda: classical("classical-60k", 900, images=60_000),
    "mlp": lambda: mlp("mlp", 30),
    "convnet": lambda: convnet("convnet", 60),
    "gpt": lambda: gpt("gpt", 120),
    "poisson": lambda: poisson("poisson", 60),
    "linear": lambda: linear("linear", 30),
}

# All but the largest: `natgrad autoencoder` runs the first two, where AdamW needs an hour for anything.
DEFAULT = tuple(name for name in WORKLOADS if name not in ("autoencoder", "autoencoder-relu", "classical-60k"))


def find(name: str) -> Callable[[], Workload]:
    """What builds the workload of a name; it raises a `DownloadError` if its data cannot be had.

    Raises:
        SettingsError: There is none of this name.
    """
    if name not in WORKLOADS:
        raise SettingsError(f"unknown workload {name!r}: choose from {', '.join(WORKLOADS)}")
    return WORKLOADS[name]
