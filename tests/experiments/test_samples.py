import io
import itertools

import pytest
import torch
from PIL import Image

from natgrad.experiments.autoencoder import Problem
from natgrad.experiments.contestants import Contestant
from natgrad.experiments.experiment import resume, start
from natgrad.experiments.mnist import embedded
from natgrad.experiments.runfolder import read_reconstructions, read_records
from natgrad.experiments.samples import is_sampled, png


@pytest.mark.parametrize("per_doubling", [2, 8])
def test_samples_are_even_on_a_logarithmic_axis(per_doubling):
    """As many in every doubling as were asked for, once it has so many steps; the first steps are all there."""
    sampled = [step for step in range(4097) if is_sampled(step, per_doubling)]
    assert sampled[:5] == [0, 1, 2, 3, 4]
    for doubling in (64, 512, 2048):
        assert len([s for s in sampled if doubling <= s < 2 * doubling]) == per_doubling
    late = [s for s in sampled if s >= 64]
    ratios = [b / a for a, b in itertools.pairwise(late)]
    assert all(r == pytest.approx(2 ** (1 / per_doubling), rel=0.03) for r in ratios)


def test_a_picture_shows_the_images_side_by_side():
    images = torch.rand(3, 784, generator=torch.Generator().manual_seed(0))
    images[1, 0], images[1, 1], images[1, 2] = 1.7, -0.5, torch.nan
    picture = torch.frombuffer(bytearray(Image.open(io.BytesIO(png(images))).tobytes()), dtype=torch.uint8)
    picture = picture.reshape(28, 84)
    assert torch.equal(picture[:, 56:], (images[2].reshape(28, 28) * 255).round().byte())
    assert picture[0, 28:31].tolist() == [255, 0, 0]


def test_the_ten_digits_are_not_trained_on(tiny):
    images, labels = embedded()
    for digit, image in enumerate(Problem(tiny()).digits):
        (found,) = (images == image).all(1).nonzero().flatten().tolist()
        assert found >= 10_000
        assert labels[found] == digit


def test_layers_are_told_of_at_some_steps_only(tiny):
    contestant = Contestant("kfac", Problem(tiny()))
    records = [contestant.advance() for _ in range(20)]
    told = [r.step for r in records if "condition_a/0" in r.diagnostics]
    assert told == [step for step in range(20) if is_sampled(step, 8)] == [*range(17), 18]
    assert all("damping_a" in record.diagnostics for record in records)


def test_pictures_are_those_of_the_parameters_at_that_step(tiny, tmp_path, console):
    start(tiny(steps=9), tmp_path / "run", console)
    for name in ("sgd", "adam"):
        pictures = read_reconstructions(tmp_path / "run", name)
        assert list(pictures) == [0, 1, 2, 3, 4, 6, 8, 9]
        contestant = Contestant(name, Problem(tiny(steps=9)))
        for step in range(10):
            if step in pictures:
                assert pictures[step].read_bytes() == png(contestant.reconstructions())
            contestant.advance()
    originals = (tmp_path / "run/digits/originals.png").read_bytes()
    assert originals == png(Problem(tiny()).digits)


def test_looking_changes_nothing(tiny, tmp_path, console, monkeypatch):
    start(tiny(), tmp_path / "run", console)
    monkeypatch.setattr("natgrad.experiments.experiment.is_sampled", lambda step, per_doubling: False)
    start(tiny(), tmp_path / "blind", console)
    losses = [[(r.train_loss, r.test_loss) for r in read_records(tmp_path / name)] for name in ("run", "blind")]
    assert losses[0] == losses[1]
    assert list(read_reconstructions(tmp_path / "blind", "sgd")) == [0, 6]


def test_a_resumed_run_goes_on_with_its_pictures_and_a_new_one_begins_anew(tiny, tmp_path, console):
    start(tiny(steps=2), tmp_path / "run", console)
    resume(tmp_path / "run", {"steps": 5}, console)
    assert list(read_reconstructions(tmp_path / "run", "adam")) == [0, 1, 2, 3, 4, 5]  # 2 and 5 as the last
    start(tiny(steps=2), tmp_path / "run", console, overwrite=True)
    assert list(read_reconstructions(tmp_path / "run", "adam")) == [0, 1, 2]
