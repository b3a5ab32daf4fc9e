import gzip
import hashlib
import struct
from pathlib import Path

import pytest
import torch

from natgrad.experiments import download, mnist
from natgrad.experiments.download import DownloadError


def idx(shape: tuple[int, ...], values: list[int]) -> bytes:
    """A gzip'd IDX file of unsigned bytes."""
    return gzip.compress(struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + bytes(values), mtime=0)


FILES = {
    "train-images-idx3-ubyte.gz": idx((2, 2, 2), [0, 51, 102, 255, 1, 2, 3, 4]),
    "train-labels-idx1-ubyte.gz": idx((2,), [7, 8]),
    "t10k-images-idx3-ubyte.gz": idx((1, 2, 2), [255, 0, 0, 0]),
    "t10k-labels-idx1-ubyte.gz": idx((1,), [9]),
}


@pytest.fixture
def small_mnist(monkeypatch, tmp_path):
    """Four tiny files instead of the real ones, an empty cache, and mirrors that refuse every connection."""
    monkeypatch.setattr(mnist, "MD5", {name: hashlib.md5(content).hexdigest() for name, content in FILES.items()})
    monkeypatch.setattr(mnist, "MIRRORS", ("http://127.0.0.1:9/first/", "http://127.0.0.1:9/second/"))
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))
    return tmp_path


def put_all(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)


def test_embedded_data_are_the_first_20_000_images():
    readme = (mnist.DATA / "README.md").read_text()
    for name in ("train-20k-images-idx3-ubyte.gz", "train-20k-labels-idx1-ubyte.gz"):
        content = gzip.decompress((mnist.DATA / name).read_bytes())
        assert hashlib.sha256(content).hexdigest() in readme


def test_embedded_has_the_promised_shapes_and_units():
    images, labels = mnist.embedded()
    assert images.shape == (20_000, 784)
    assert images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (0.0, 1.0)
    assert labels.dtype == torch.int64
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    # The first pixel of the first digit that is not blank: row 5, column 12, grey level 3.
    assert images[0].nonzero()[0].item() == 5 * 28 + 12
    assert images[0, 5 * 28 + 12].item() == pytest.approx(3 / 255)


def test_files_put_into_the_cache_by_hand_need_no_network(small_mnist):
    put_all(small_mnist)
    data = mnist.download()
    assert data.train_images.tolist()[0] == pytest.approx([0, 0.2, 0.4, 1])
    assert data.train_labels.tolist() == [7, 8]
    assert data.test_images.tolist() == [[1, 0, 0, 0]]
    assert data.test_labels.tolist() == [9]


def test_a_file_that_was_compressed_anew_is_the_same_file(small_mnist, monkeypatch):
    put_all(small_mnist)
    name = "train-labels-idx1-ubyte.gz"
    content = gzip.decompress(FILES[name])
    (small_mnist / name).write_bytes(gzip.compress(content, compresslevel=1, mtime=1))
    monkeypatch.setitem(mnist.MD5_UNPACKED, name, hashlib.md5(content).hexdigest())
    assert mnist.download().train_labels.tolist() == [7, 8]
    (small_mnist / name).write_bytes(FILES[name][:-9])
    with pytest.raises(DownloadError, match="train-labels"):
        mnist.download()


def test_offline_message_says_what_from_where_and_what_to_do(small_mnist):
    put_all(small_mnist)
    (small_mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DownloadError) as caught:
        mnist.download()
    message = str(caught.value)
    assert "could not fetch t10k-labels-idx1-ubyte.gz" in message
    for mirror in mnist.MIRRORS:
        assert f"{mirror}t10k-labels-idx1-ubyte.gz: ConnectionError" in message
    assert str(small_mnist / "t10k-labels-idx1-ubyte.gz") in message
    assert mnist.MD5["t10k-labels-idx1-ubyte.gz"] in message
    assert "NATGRAD_DATA" in message
    assert "natgrad demo" in message


def test_a_corrupt_file_is_not_used(small_mnist):
    put_all(small_mnist)
    (small_mnist / "train-labels-idx1-ubyte.gz").write_bytes(idx((2,), [1, 1]))
    with pytest.raises(DownloadError, match="train-labels"):
        mnist.download()


def test_the_second_mirror_is_tried_when_the_first_fails(small_mnist, monkeypatch):
    asked = []

    def retrieve(url, known_hash, fname, path):
        asked.append(url)
        if "first" in url:
            raise ValueError("hash mismatch")
        assert known_hash == f"md5:{mnist.MD5[fname]}"
        (Path(path) / fname).write_bytes(FILES[fname])
        return str(Path(path) / fname)

    monkeypatch.setattr(download.pooch, "retrieve", retrieve)
    assert mnist.download().train_labels.tolist() == [7, 8]
    assert [url.split("/")[3] for url in asked] == ["first", "second"] * 4


def test_the_checksums_are_the_published_ones():
    assert mnist.MD5 == {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea30749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    }


def test_other_formats_are_refused(small_mnist, monkeypatch):
    put_all(small_mnist)
    floats = gzip.compress(struct.pack(">HBBI", 0, 0x0D, 1, 1) + b"1234", mtime=0)
    (small_mnist / "train-images-idx3-ubyte.gz").write_bytes(floats)
    monkeypatch.setitem(mnist.MD5, "train-images-idx3-ubyte.gz", hashlib.md5(floats).hexdigest())
    with pytest.raises(ValueError, match="not an IDX file of unsigned bytes"):
        mnist.download()
