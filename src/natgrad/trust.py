"""Stage 7, between its halves: how far the blocks of curvature can be trusted, as the steps show.

A step is made for one batch, by blocks that know neither each other nor other data. Two numbers tell how good that is:

- **What the next batch confirms**: of the fall of the loss that a step promised on its own batch, the share that the
  next one sees. It is all of it on a full batch and where targets are without noise, and next to nothing where a step
  has only learnt its batch by heart.
- **The rate that the quadratic model chose.** It is one where the blocks are the curvature, and as much smaller as the
  curvature along their direction is larger than they say.

Where a fair rate was chosen and a fair share confirmed, less damping would have done, and is tried the next time; where
either is small there was too little. Only steps can tell: on linear networks and for smooth solutions of differential
equations damping must fall to nothing, while noisy minibatches need all that there is.
"""

import math
from collections.abc import MutableMapping
from typing import Any

import torch

# Of the running average of what is confirmed.
DECAY = 0.8
# Damping falls by the factor EASIER where rates were above FAIR_RATE and the confirmed share above FAIR_SHARE; it grows
# by HARDER where the one was below POOR_RATE or the other below POOR_SHARE. Between 1 and LEAST of what it would be.
FAIR_RATE, FAIR_SHARE, EASIER = 0.1, 0.2, 0.25
POOR_RATE, POOR_SHARE, HARDER = 0.03, 0.1, 2.0
LEAST = 0.003
LEAST_RATE = 1e-6  # of a step that was not taken


class Trust:
    """What the steps so far have shown, kept as tensors in a mapping.

    Args:
        state: Of the first layer's first parameter: ``confirmed``, the running average of the confirmed share; and
            ``ease``: what damping is multiplied by, and the confirmed share when that was last set; the sum of the
            logarithms of the rates since, and their number.
    """

    def __init__(self, state: MutableMapping[str, Any]) -> None:
        self.state = state

    @property
    def confirmed(self) -> float:
        """Share of the promised fall that later batches confirmed, between 0 and 1; 0 before any did."""
        return float(self.state["confirmed"]) if "confirmed" in self.state else 0.0

    @property
    def ease(self) -> float:
        """What damping is multiplied by."""
        return self._ease[0]

    @property
    def settled_share(self) -> float:
        """The confirmed share that the inverses were made with, which is not the latest in a checkpoint."""
        return self._ease[1]

    def confirm(self, share: float) -> None:
        """Fold in the share that the latest batch confirmed."""
        latest = torch.tensor([min(max(share, 0.0), 1.0)])
        self.state["confirmed"] = torch.lerp(latest, self.state.get("confirmed", latest), DECAY)

    def chose(self, rate: float) -> None:
        """Note the rate that the quadratic model chose."""
        ease, share, logarithms, count = self._ease
        self.state["ease"] = torch.tensor([ease, share, logarithms + math.log(max(rate, LEAST_RATE)), count + 1])

    def settle(self) -> None:
        """Before inverses are refreshed: set the ease by the steps since it was last set, if there were any."""
        ease, _, logarithms, count = self._ease
        share = self.confirmed
        if not (count or share):
            return
        if count:
            rate = math.exp(logarithms / count)
            if rate > FAIR_RATE and share > FAIR_SHARE:
                ease = max(ease * EASIER, LEAST)
            elif rate < POOR_RATE or share < POOR_SHARE:
                ease = min(ease * HARDER, 1.0)
        self.state["ease"] = torch.tensor([ease, share, 0.0, 0.0])

    @property
    def _ease(self) -> list[float]:
        kept: list[float] = self.state["ease"].tolist() if "ease" in self.state else [1.0, 0.0, 0.0, 0.0]
        return kept
