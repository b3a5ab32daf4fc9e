"""What a run records at some of its steps only, so that its folder stays small: numbers of each layer, and pictures.

Steps are sampled evenly on a logarithmic axis, which is where curves are looked at; the first few are all sampled.
"""

import io
import math

from PIL import Image
from torch import Tensor

# Eight a doubling, a run of 10,000 steps tells of each layer about 90 times; two a doubling, it leaves 27 pictures, and
# tells as often of each layer's eigenvalues.
LAYERS_PER_DOUBLING, PICTURES_PER_DOUBLING = 8, 2
SIDE = 28


def is_sampled(step: int, per_doubling: int) -> bool:
    """Whether ``step`` is the first in its part of an axis where each doubling has so many equal parts."""
    return step < 2 or _part(step, per_doubling) > _part(step - 1, per_doubling)


def _part(step: int, per_doubling: int) -> int:
    return math.floor(math.log2(step) * per_doubling)


def png(images: Tensor) -> bytes:
    """Images (n, 784), values in [0, 1] or cut to it, side by side as a grey PNG of (28, 28 n) pixels."""
    grey = images.detach().nan_to_num(0.0).clamp(0, 1).mul(255).round().byte()
    strip = grey.unflatten(1, (SIDE, SIDE)).transpose(0, 1).flatten(1)  # (28, n · 28)
    buffer = io.BytesIO()
    Image.fromarray(strip.cpu().numpy()).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
