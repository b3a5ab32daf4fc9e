"""Signal and noise of a layer's gradient, from how much the gradients of single data differ.

The gradient V = Σ_n V_n is a sum over N data. In the metric P of the preconditioner, its squared length is that of its
expectation plus that of its noise, and the second is known from the gradients of some of the data:

    total   tr VᵀP(V)        noise   (N · mean_n tr V_nᵀP(V_n) − total / N) · N / (N − 1)

The last factor is that of every variance from a sample, without which a single datum would have no noise. The share of
noise in the total is averaged over steps, as it is noisy where the one hardly exceeds the other. The two themselves
fall by orders of magnitude, and an average of them would be that of the first steps for long.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from natgrad.calls import Sample
from natgrad.inverses import Inverse
from natgrad.layers import Layer, at_least_float32

# Of the running average; and the least share of signal that is believed, as no finite number of steps can show less.
DECAY, LEAST_SIGNAL = 0.7, 1e-3
# Data whose lengths are computed.
ENOUGH = 64
State = dict[str, Tensor]


def measure(
    layer: Layer, V: Tensor, samples: Sequence[Sample], inverse: Inverse, state: State, scaler: float
) -> Tensor:
    """Squared length of the gradient, sum of those of single data, and number of the data; (3,).

    Args:
        layer: Whose gradient it is.
        V: The gradient as a matrix.
        samples: Of its data.
        inverse: How the metric is kept.
        state: The layer's, with the metric in it.
        scaler: How many times longer the gradients of single data are than fits the gradient of the layer.
    """
    data = sum(sample.data for sample in samples)
    energy = torch.zeros((), dtype=V.dtype, device=V.device)
    for sample in samples:
        rows = sample.rows()
        if rows is not None:
            lengths = inverse.lengths(state, sample.layers[0], *representatives(*rows))
            energy = energy + sample.data * lengths / (rows[1].shape[-3] * scaler**2)
    total = torch.sum(inverse.solve(state, V) * V)
    return torch.stack([total, energy, total.new_tensor(data)])


def representatives(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of fewer data that stand for all of them: their gradients have the same squared lengths in total.

    Data are drawn in proportion to |g|², at equal distances, so that those whose gradients dominate are all there, and
    count for as many as they stand for.

    Args:
        x: Rows of the input, ([B,] N, S, in).
        g: Rows of the gradient, ([B,] N, S, out).
    """
    data, g = g.shape[-3], at_least_float32(g)
    if data <= ENOUGH:
        return x, g
    sizes = torch.linalg.vector_norm(g, dim=[d for d in range(-g.ndim, 0) if d != -3]).square()
    upto = sizes.cumsum(0)
    places = (torch.arange(ENOUGH, dtype=upto.dtype, device=upto.device) + 0.5) / ENOUGH
    chosen = torch.searchsorted(upto, places * upto[-1]).clamp(max=data - 1)
    counts = (upto[-1] / (ENOUGH * sizes[chosen])).nan_to_num(0.0)  # where there is no gradient at all
    return x.index_select(-3, chosen), g.index_select(-3, chosen) * counts.sqrt().reshape(-1, 1, 1)


def split(total: float, energy: float, data: float) -> tuple[float, float] | None:
    """(total, noise) of one batch from what ``measure`` told of it, without bias; None of fewer than two data."""
    if data < 2 or not energy > 0 or not total > 0:
        return None
    return total, max(energy - total / data, 0.0) * data / (data - 1)


def remember(state: State, total: float, noise: float, anew: bool) -> None:
    """Fold the share of noise in the latest total into its running average, which is kept where it is read."""
    share = torch.tensor(min(noise / total, 1.0), dtype=torch.float64, device="cpu")
    state["noise"] = share if anew or "noise" not in state else torch.lerp(state["noise"], share, 1 - DECAY)


def ratio(shares: Sequence[float]) -> float:
    """Noise over signal, of one layer or on average over several; as of noise alone if nothing is known."""
    if not shares:
        return 1 / LEAST_SIGNAL
    share = mean(shares)
    return share / max(1 - share, LEAST_SIGNAL)


def share(states: Iterable[State]) -> float:
    """Of noise in the latest gradients: the mean over the layers that know theirs; 0 if none does."""
    shares = known(states)
    return mean(shares) if shares else 0.0


def known(states: Iterable[State]) -> list[float]:
    """The shares of the layers that know theirs."""
    return [float(state["noise"]) for state in states if "noise" in state]


def mean(shares: Sequence[float]) -> float:
    """Of shares of noise."""
    return sum(shares) / len(shares)
