"""Where a forward pass drew its dropout from, so that natgrad can look at the same function again."""

import torch
from torch import Tensor, nn


def accelerators(model: nn.Module) -> list[torch.device]:
    """Those that a model is on and that have a random stream of their own."""
    here = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    return sorted(here, key=str)


class Chance:
    """The random streams that a model may draw from, as they are now: that of the processor and of its devices.

    Args:
        model: The module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._devices = accelerators(model)
        self._states = self._read()

    def if_drawn(self) -> "Chance | None":
        """Itself if the streams have moved on since."""
        return None if all(map(torch.equal, self._states, self._read())) else self

    def restore(self) -> None:
        """Put the streams back."""
        torch.set_rng_state(self._states[0])
        for device, state in zip(self._devices, self._states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]
