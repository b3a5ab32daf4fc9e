"""MNIST: 20,000 images shipped with the package, the full set on demand.

- `embedded`: the first 20,000 training images, enough for the article's experiment; needs no network.
- `download`: the full 60,000 + 10,000, fetched once (`natgrad.experiments.download`).

Images are (N, 784) float32 in [0, 1], labels (N,) int64. Files are IDX: a big-endian header (two zero bytes, a type
code, the number of dimensions, the dimensions), then the bytes.
"""

import gzip
import hashlib
import struct
import zlib
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from natgrad.experiments.download import cache_folder, fetch

DATA = files("natgrad.experiments") / "data"

# Tried in this order. The checksums are of the compressed files as first published, which both mirrors carry.
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea30749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
# Of what is in them: a file put into the cache by hand may have been compressed anew.
MD5_UNPACKED = {
    "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637",
}

_WITHOUT = (
    "Without it, whatever uses `mnist.embedded()` works: `natgrad demo`, `natgrad autoencoder` and the test suite run "
    "on the 20,000 images shipped with natgrad."
)


class Mnist(NamedTuple):
    """The full data set: images (N, 784) float32 in [0, 1], labels (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def embedded() -> tuple[Tensor, Tensor]:
    """The first 20,000 images of MNIST's training set, as shipped with natgrad.

    Returns:
        Images (20000, 784) float32 in [0, 1], and labels (20000,) int64.
    """
    images = (DATA / "train-20k-images-idx3-ubyte.gz").read_bytes()
    labels = (DATA / "train-20k-labels-idx1-ubyte.gz").read_bytes()
    return _images(images), _labels(labels)


def download() -> Mnist:
    """The full MNIST, fetched on first use and cached.

    Returns:
        60,000 training and 10,000 test images with their labels.

    Raises:
        DownloadError: A file is neither cached nor to be had from any mirror.
    """
    content = {name: _fetch(name).read_bytes() for name in MD5}
    return Mnist(
        _images(content["train-images-idx3-ubyte.gz"]),
        _labels(content["train-labels-idx1-ubyte.gz"]),
        _images(content["t10k-images-idx3-ubyte.gz"]),
        _labels(content["t10k-labels-idx1-ubyte.gz"]),
    )


def _fetch(name: str) -> Path:
    cached = cache_folder() / name
    if cached.is_file() and _unpacked_md5(cached) == MD5_UNPACKED[name]:
        return cached
    return fetch(name, [mirror + name for mirror in MIRRORS], f"md5:{MD5[name]}", _WITHOUT)


def _unpacked_md5(path: Path) -> str | None:
    """None where the file cannot be unpacked."""
    try:
        return hashlib.md5(gzip.decompress(path.read_bytes())).hexdigest()
    except (OSError, EOFError, zlib.error):
        return None


def _images(content: bytes) -> Tensor:
    pixels = _read_idx(content)
    return pixels.reshape(pixels.shape[0], -1).float() / 255


def _labels(content: bytes) -> Tensor:
    return _read_idx(content).long()


def _read_idx(content: bytes) -> Tensor:
    """Decode a gzip'd IDX file of unsigned bytes into a uint8 tensor of the shape that its header gives."""
    raw = gzip.decompress(content)
    zeros, type_code, dimensions = struct.unpack(">HBB", raw[:4])
    if zeros != 0 or type_code != 0x08:
        raise ValueError(f"not an IDX file of unsigned bytes: it starts with {raw[:4]!r}")
    shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
    # A bytearray, because torch warns about a buffer it may not write to.
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 + 4 * dimensions).reshape(shape)
