import numpy as np
import pytest
import torch

from natgrad.experiments.autoencoder import Problem, half_squared_error, network
from natgrad.experiments.curves import recorded
from natgrad.experiments.settings import Settings


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "relu"])
def test_a_run_starts_where_the_articles_did(nonlinearity):
    """The weights' stream, their order and bounds, the data, the loss and the nonlinearity, in one figure."""
    settings = Settings(nonlinearity=nonlinearity)
    problem, model = Problem(settings), network(settings)
    start = recorded(nonlinearity)["adam"].points[0]
    assert problem.test_loss(model) == pytest.approx(start.test_loss, abs=1e-3)
    if nonlinearity == "sigmoid":
        with torch.no_grad():
            train_loss = half_squared_error(model(problem.train), problem.train).item()
        assert train_loss == pytest.approx(97.5424, abs=1e-3)


def test_the_layers_are_the_articles():
    shapes = [tuple(p.shape) for p in network(Settings()).parameters()]
    assert [shapes[0][1], *(out for out, _ in shapes)] == [784, 1024, 1024, 1024, 196, 1024, 1024, 1024, 784]


def test_the_loss_is_half_the_squared_error_summed_over_pixels_averaged_over_images():
    output, target = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 2.0]])
    assert half_squared_error(output, target).item() == ((1 + 4) / 2 + (0 + 4) / 2) / 2


def test_equal_seeds_give_equal_weights_and_leave_the_global_streams_alone(tiny):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second, other = network(tiny()), network(tiny()), network(tiny(seed=2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first[0].weight, other[0].weight)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_weight_normalization_does_not_move_the_start(tiny):
    problem = Problem(tiny())
    plain, normed = network(tiny()), network(tiny(weight_norm=True))
    assert problem.test_loss(normed) == pytest.approx(problem.test_loss(plain), rel=1e-5)
    assert any("original0" in name for name, _ in normed.named_parameters())


def test_training_and_test_images_are_the_articles_halves(tiny):
    problem = Problem(Settings())
    assert problem.train.shape == problem.test.shape == (10_000, 784)
    small = Problem(tiny())
    assert torch.equal(small.train, problem.train[:48])
    assert torch.equal(small.test, problem.test[:48])
    assert not torch.equal(small.train, small.test)


def test_minibatches_are_a_new_permutation_each_epoch(tiny):
    problem = Problem(tiny(batch_size=10))
    # An image is recognized by its pixel sum.
    epochs = [[problem.batch(e * 4 + k).sum(1).tolist() for k in range(4)] for e in range(2)]
    known = problem.train.sum(1).tolist()
    for epoch in epochs:
        seen = [image for batch in epoch for image in batch]
        assert len(seen) == len(set(seen)) == 40
        assert set(seen) <= set(known)
        assert seen != known[:40]
    assert epochs[0] != epochs[1]


def test_the_order_of_minibatches_depends_on_the_seed_alone(tiny):
    one, same, other = (Problem(tiny(batch_size=10, seed=seed)) for seed in (1, 1, 2))
    same.batch(0)  # Asking for one batch must not change another.
    assert torch.equal(one.batch(5), same.batch(5))
    assert not torch.equal(one.batch(5), other.batch(5))


def test_the_full_batch_keeps_the_order_of_the_images(tiny):
    problem = Problem(tiny())
    assert torch.equal(problem.batch(3), problem.train)
