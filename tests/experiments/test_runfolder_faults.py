"""A full disk: what was written before is still there and can be read, and writing goes on when there is room again."""

import json

import pytest
import torch

from natgrad import checkpoint
from natgrad.experiments.contestants import Record
from natgrad.experiments.runfolder import CHECKPOINT, CONFIG, METRICS, RunFolder, read_records, write_json
from test_checkpoint import no_more_than


@pytest.fixture
def folder(tiny, tmp_path):
    return RunFolder.create(tmp_path / "run", tiny())


def record(step):
    return Record("sgd", step, train_loss=0.5, test_loss=None, seconds=0.1, diagnostics={})


def files(folder):
    return {path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*") if path.is_file()}


def test_half_a_record_is_taken_back(folder):
    folder.append(record(0))
    before = (folder.path / METRICS).read_bytes()
    with no_more_than(len(before) + 10), pytest.raises(OSError, match=r"No space left|File too large"):
        folder.append(record(1))
    assert (folder.path / METRICS).read_bytes() == before
    folder.append(record(2))
    assert [r.step for r in read_records(folder.path)] == [0, 2]


class Large:
    """A contestant with much state."""

    name = "sgd"

    def state_dict(self):
        return {"step": 1, "weights": torch.ones(10_000)}


def test_files_that_are_replaced_stay(folder):
    checkpoint.save({"sgd": {"step": 0}}, folder.path / CHECKPOINT)
    config, there = (folder.path / CONFIG).read_text(), files(folder)
    with no_more_than(100):
        with pytest.raises(OSError, match="File too large"):
            folder.save_checkpoint([Large()])
        with pytest.raises(OSError, match="File too large"):
            write_json(folder.path / CONFIG, {"much": "x" * 1000})
        with pytest.raises(OSError, match="File too large"):
            folder.save_digits("one.png", torch.rand(10, 784))
    assert checkpoint.load(folder.path / CHECKPOINT) == {"sgd": {"step": 0}}
    assert (folder.path / CONFIG).read_text() == config
    assert json.loads(config)
    assert files(folder) == there


def test_so_they_do_when_the_disk_is_full_at_the_last_moment(folder, monkeypatch):
    """At the flush to the disk, where some file systems notice."""
    checkpoint.save({"sgd": {"step": 0}}, folder.path / CHECKPOINT)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save_checkpoint([Large()])
    assert checkpoint.load(folder.path / CHECKPOINT) == {"sgd": {"step": 0}}
    assert CHECKPOINT in files(folder)
    assert not any(name.endswith(".tmp") for name in files(folder))
