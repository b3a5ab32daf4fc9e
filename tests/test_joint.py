"""Several outputs with a loss each: against automatic differentiation of their sum, and against one output."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    gaussian_nll_loss,
    mse_loss,
    nll_loss,
    poisson_nll_loss,
)
from torch.nn.parallel import DistributedDataParallel

import natgrad
import ranks
from natgrad.joint import Joint, Part
from natgrad.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    LogCategorical,
    MeanVariance,
    Poisson,
)
from natgrad.losses import resolve
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")

DATA = 4
DECLARED = {"class": "cross_entropy", "size": (0.3, "mse"), "mask": (2, nn.BCEWithLogitsLoss())}


def several(seed: int = 0, data: int = DATA) -> dict[str, Tensor]:
    """Logits of three classes at two positions, a number, and two times two logits."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"class": (data, 3, 2), "size": (data,), "mask": (data, 2, 2)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def targets(data: int = DATA) -> dict[str, Tensor]:
    drawn = several(1, data)
    return {"class": drawn["class"].argmax(1), "size": drawn["size"], "mask": (drawn["mask"] > 0).double()}


def loss(outputs: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
    """The sum that is declared above, as a training loop computes it."""
    number, mask = mse_loss(outputs["size"], y["size"]), binary_cross_entropy_with_logits(outputs["mask"], y["mask"])
    return cross_entropy(outputs["class"], y["class"]) + 0.3 * number + 2 * mask


def joined(outputs: dict[str, Tensor]) -> tuple[Joint, Tensor]:
    likelihood = resolve(DECLARED).likelihood
    assert isinstance(likelihood, Joint)
    return likelihood, likelihood.join(likelihood.heads(outputs))


def of_joined(likelihood: Joint, f: Tensor) -> Tensor:
    return loss(dict(zip(likelihood.parts, likelihood.split(f), strict=True)), targets())


def test_the_hessian_is_that_of_the_sum() -> None:
    """Each weight and each reduction counts; no column reaches another datum or another head."""
    likelihood, f = joined(several())
    n = f.numel()
    expected = jacrev(jacrev(lambda f: of_joined(likelihood, f)))(f).reshape(n, n)
    R = likelihood.scale(likelihood.terms(f))
    products = torch.stack([likelihood.hessian_product(f, e.reshape(f.shape)).flatten() for e in torch.eye(n)])
    assert relative_error(R * products, expected) < 1e-12
    columns = torch.stack(list(likelihood.columns(f)))
    assert len(columns) == f.shape[1]
    per_datum = torch.einsum("knd,kne->nde", columns, columns)
    assert relative_error(R * torch.block_diag(*per_datum), expected) < 1e-12


def test_each_head_is_smoothed_by_its_own_number_of_criteria() -> None:
    """Of twice as many rows as there are here."""
    likelihood, f = joined(several())
    smoothed = likelihood.smoothed(f, 2 * DATA)
    v = torch.randn(f.shape, generator=torch.Generator().manual_seed(3))
    numbers = {"class": 2 * DATA * 2, "size": 2 * DATA, "mask": 2 * DATA * 4}
    products = likelihood.split(likelihood.scale(likelihood.terms(f)) * smoothed.hessian_product(f, v))
    heads = zip(likelihood.split(f), likelihood.split(v), products, strict=True)
    for (key, part), (head, vector, product) in zip(likelihood.parts.items(), heads, strict=True):
        own = part.likelihood.smoothed(head, numbers[key])
        expected = part.weight * own.scale(own.terms(head)) * own.hessian_product(head, vector)
        assert torch.allclose(product, expected, atol=1e-12)
        if key != "size":
            plain = part.weight * own.scale(own.terms(head)) * part.likelihood.hessian_product(head, vector)
            assert not torch.allclose(product, plain, atol=1e-4)


def test_second_moment_of_the_samples_is_the_hessian() -> None:
    """Also catches one draw for two heads."""
    likelihood, one = joined({key: head[:1] for key, head in several().items()})
    M = 40_000
    draws = likelihood.sample(one.expand(M, -1), torch.Generator().manual_seed(0))
    columns = torch.stack(list(likelihood.columns(one))).flatten(1)
    bound = 15 * max(1.0, float(columns.square().sum(0).max())) / M**0.5
    assert (draws.T @ draws / M - columns.T @ columns).abs().max() < bound


def test_divergence_and_gradient_make_the_exact_change() -> None:
    likelihood, f = joined(several())
    moved = f + several(2)["size"][:, None]
    R = likelihood.scale(likelihood.terms(f))
    gradient, after = (torch.func.grad(lambda f: of_joined(likelihood, f))(at) for at in (f, moved))
    change = torch.sum(gradient * (moved - f)) + R * likelihood.divergence(f, moved).sum()
    assert torch.allclose(change, of_joined(likelihood, moved) - of_joined(likelihood, f), atol=1e-12)
    assert torch.allclose(R * likelihood.gradient_change(f, moved), after - gradient, atol=1e-12)


def test_targets_count_where_they_do_not_enter_linearly() -> None:
    """A Poisson rate and a learnt variance: what they change by depends on the data's targets, not on expected ones."""
    drawn = several()
    heads = {"rate": drawn["mask"].exp(), "normal": torch.stack([drawn["size"], drawn["size"].exp()], dim=1)}
    likelihood = Joint({"rate": Part(3.0, Poisson(log_input=False)), "normal": Part(0.5, MeanVariance())})
    f = likelihood.join(likelihood.heads(heads))
    moved = 1.3 * f
    y = several(1)

    def value(f: Tensor) -> Tensor:
        rate, normal = likelihood.split(f)
        counts = poisson_nll_loss(rate, y["mask"].exp().round(), log_input=False)
        return 3 * counts + 0.5 * gaussian_nll_loss(normal[:, 0], y["size"], normal[:, 1])

    R, gradient = likelihood.scale(likelihood.terms(f)), torch.func.grad(value)(f)
    change = torch.sum(gradient * (moved - f)) + R * likelihood.remainder(f, moved, gradient / R).sum()
    assert torch.allclose(change, value(moved) - value(f), atol=1e-12)


def test_nothing_but_what_is_of_the_sum_is_left_to_the_defaults() -> None:
    """A method that a likelihood gains and that heads are not asked for would be that of no head."""
    methods = {name for name, kept in vars(Likelihood).items() if callable(kept) and not name.startswith("_")}
    assert methods - vars(Joint).keys() == {"check", "terms", "scale", "counted"}


def test_the_loss_that_was_called_is_known_head_by_head() -> None:
    """``nll_loss`` of log-probabilities, declared as a cross-entropy, beside another head."""
    drawn, y = several(), targets()
    heads = {"class": drawn["class"].log_softmax(1).requires_grad_(), "size": drawn["size"].requires_grad_()}
    likelihood = Joint({"class": Part(1.0, Categorical()), "size": Part(1.0, Gaussian())})
    gradients = torch.autograd.grad(
        nll_loss(heads["class"], y["class"]) + mse_loss(heads["size"], y["size"]), [*heads.values()]
    )
    f = likelihood.join(likelihood.heads(heads)).detach()
    called = likelihood.as_called(f, likelihood.join(gradients))
    assert isinstance(called.parts["class"].likelihood, LogCategorical)
    assert called.parts["size"].likelihood is likelihood.parts["size"].likelihood
    assert type(likelihood.parts["class"].likelihood) is Categorical


def test_the_reach_is_that_of_every_head() -> None:
    """None, as soon as one is unbounded: its weight in the loop may be another."""
    outputs = several()
    likelihood, f = joined(outputs)
    assert likelihood.reach(f, f) is None
    bounded = Joint({"class": Part(1.0, Categorical()), "mask": Part(2.0, Bernoulli())})
    f = bounded.join(bounded.heads(outputs))
    y = targets()
    heads = [outputs[key].requires_grad_() for key in ("class", "mask")]
    value = cross_entropy(heads[0], y["class"]) + 2 * binary_cross_entropy_with_logits(heads[1], y["mask"])
    gradient = bounded.join(torch.autograd.grad(value, heads))
    reach = bounded.reach(f.detach(), gradient)
    assert reach is not None
    ratio = gradient.abs() / (bounded.scale(DATA) * reach)
    assert (ratio < 1 + 1e-12).all()
    for own in bounded.split(ratio):  # labels are at their bound
        assert own.max().item() == pytest.approx(1)
    assert torch.allclose(bounded.split(ratio)[1], torch.ones(()))


# A network with several heads.


class Heads(nn.Module):
    """A body with three heads, whose outputs a function of the test's arranges."""

    def __init__(self, arrange: Callable[[dict[str, Tensor]], Any] = dict) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        self.heads = nn.ModuleDict({key: nn.Linear(7, head[0].numel()) for key, head in several().items()})
        self.arrange = arrange

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        shapes = {key: (len(x), *head.shape[1:]) for key, head in several().items()}
        return self.arrange({key: head(h).reshape(shapes[key]) for key, head in self.heads.items()})


def side_by_side(outputs: dict[str, Tensor]) -> Tensor:
    return torch.cat([outputs["class"].flatten(1), outputs["size"][:, None], outputs["mask"].flatten(1)], 1)


def apart(row: Tensor) -> dict[str, Tensor]:
    return {"class": row[:, :6].unflatten(1, (3, 2)), "size": row[:, 6], "mask": row[:, 7:].unflatten(1, (2, 2))}


def train(model: nn.Module, see: Callable[[Any], dict[str, Tensor]], steps: int = 4, **settings: Any) -> Tensor:
    """The losses of some steps on more data than the quadratic model takes."""
    data, losses = 150, []
    x, y = torch.randn(data, 5, generator=torch.Generator().manual_seed(3)), targets(data)
    optimizer = natgrad.KFAC(model, **{"loss": DECLARED, **settings})
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(see(model(x)), y)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses)


WAYS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], Callable[[Any], dict[str, Tensor]], dict[str, Any]]] = {
    "tuple": (
        lambda o: tuple(o.values()),
        lambda out: dict(zip(DECLARED, out, strict=True)),
        {"loss": tuple(DECLARED.values())},
    ),
    "object": (lambda o: SimpleNamespace(**o), vars, {}),
    "object and function": (lambda o: SimpleNamespace(**o), vars, {"output": vars}),
    "renamed": (
        lambda o: {"a": o["class"], "b": o["size"], "c": o["mask"]},
        lambda out: dict(zip(DECLARED, out.values(), strict=True)),
        {"output": lambda out: dict(zip(DECLARED, out.values(), strict=True))},
    ),
    "one tensor": (side_by_side, apart, {"output": apart}),
    "classes last": (
        lambda o: {**o, "class": o["class"].mT},
        lambda out: {**out, "class": out["class"].mT},
        {"output": lambda out: {**out, "class": out["class"].mT}},
    ),
    "two of three in one": (
        lambda o: (o["mask"], side_by_side(o)[:, :7]),
        lambda out: {**apart(torch.cat([out[1], out[0].flatten(1)], 1))},
        {"output": lambda out: apart(torch.cat([out[1], out[0].flatten(1)], 1))},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_does_not_matter_how_the_outputs_are_returned(way: str) -> None:
    arrange, see, settings = WAYS[way]
    expected = train(Heads(), dict)
    assert expected[-1] < expected[0]
    assert torch.allclose(train(Heads(arrange), see, **settings), expected, rtol=1e-9)


def test_several_squared_errors_are_one_of_all_entries() -> None:
    """2 · mean over two entries + 3 · mean over three = the sum over five."""

    def run(model: nn.Module, loss: Any, split: Callable[[Any], tuple[Tensor, Tensor]]) -> Tensor:
        x, y = torch.randn(200, 4, generator=torch.Generator().manual_seed(1)), several(2, 200)
        optimizer = natgrad.KFAC(model, loss=loss, fisher="exact")
        for _ in range(4):
            optimizer.zero_grad()
            a, b = split(model(x))
            (2 * mse_loss(a, y["mask"][:, 0]) + 3 * mse_loss(b, y["class"][..., 0])).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    class Two(nn.Module):
        def __init__(self, together: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net, self.together = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)), together

        def forward(self, x: Tensor) -> Any:
            out = self.net(x)
            return out if self.together else out.split([2, 3], dim=1)

    one = run(Two(True), Gaussian("batchmean", half=False), lambda out: out.split([2, 3], dim=1))
    assert torch.allclose(run(Two(False), ((2, "mse"), (3, "mse")), tuple), one, rtol=1e-8, atol=1e-12)


def test_a_tensor_joined_of_several_is_one_output() -> None:
    """The gradient of the user's loss arrives at the parts, and is noted there."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(5, 1), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x).squeeze(1), self.b(x)

    x, y = torch.randn(150, 5, generator=torch.Generator().manual_seed(1)), torch.ones(150, 5)
    model = Pair()
    optimizer = natgrad.KFAC(model, "mse", output=lambda out: torch.cat([out[0][:, None], out[1]], 1))
    for _ in range(6):
        optimizer.zero_grad()
        a, b = model(x)
        value = ((a - y[:, 0]).square().sum() + (b - y[:, 1:]).square().sum()) / y.numel()
        value.backward()
        optimizer.step()
    assert value < 1e-3


def test_micro_batches_are_one_batch() -> None:
    """Up to the noise of sampled curvature, of which there is none with ``exact``."""
    model, halves = Heads(), Heads()
    x, y = torch.randn(60, 5, generator=torch.Generator().manual_seed(3)), targets(60)
    optimizers = [natgrad.KFAC(m, DECLARED, fisher="exact", lr=0.1, damping=0.1) for m in (model, halves)]
    loss(model(x), y).backward()
    for half in (slice(30), slice(30, None)):
        (loss(halves(x[half]), {key: of[half] for key, of in y.items()}) / 2).backward()
    for optimizer in optimizers:
        optimizer.step()
    for whole, split in zip(model.parameters(), halves.parameters(), strict=True):
        assert torch.allclose(whole, split, rtol=1e-9, atol=1e-12)


def test_a_head_may_have_no_loss_in_a_step() -> None:
    """Tasks that take turns."""
    model = Heads()
    optimizer = natgrad.KFAC(model, DECLARED)
    x, y = torch.randn(60, 5, generator=torch.Generator().manual_seed(3)), targets(60)

    def losses() -> tuple[Tensor, Tensor]:
        out = model(x)
        return cross_entropy(out["class"], y["class"]), 0.3 * mse_loss(out["size"], y["size"])

    before = losses()
    for step in range(6):
        optimizer.zero_grad()
        losses()[step % 2].backward()
        optimizer.step()
    assert all(after < 0.95 * first for after, first in zip(losses(), before, strict=True))


def test_curvature_is_verified_for_several_outputs() -> None:
    """A linear network: the blocks of one datum are exact; the targets come by the same keys."""
    model = Heads().eval()
    x, y = torch.randn(1, 5), targets(1)
    report = natgrad.verify(model, x, y, DECLARED)
    assert [layer.verdict for layer in report.layers] == ["exact"] * 4
    some = natgrad.verify(model, torch.randn(9, 5), targets(9), DECLARED, max_outputs=23)
    assert some.notes == ["The first 2 of 9 data were used, as all of them have 99 output entries."]


def test_labels_that_are_missing_have_no_curvature() -> None:
    """The change of the loss is exact, although only its gradient tells which data have a label for which head."""
    model = Heads(lambda o: {"class": o["class"], "mask": o["mask"]})
    x, y = torch.randn(60, 5, generator=torch.Generator().manual_seed(3)), targets(60)
    has_class, has_mask = torch.arange(60) % 3 == 0, torch.arange(60) % 3 > 0

    def loss() -> Tensor:
        out = model(x)
        of_class = cross_entropy(out["class"][has_class], y["class"][has_class], reduction="sum")
        of_mask = binary_cross_entropy_with_logits(out["mask"][has_mask], y["mask"][has_mask], reduction="sum")
        return (of_class + of_mask) / 60

    declared = natgrad.likelihoods.Categorical("batchmean"), natgrad.likelihoods.Bernoulli("batchmean")
    optimizer = natgrad.KFAC(model, dict(zip(("class", "mask"), declared, strict=True)))
    for _ in range(4):
        optimizer.zero_grad()
        before = loss()
        before.backward()
        optimizer.step()
        with torch.no_grad():
            change = (loss() - before).item()
        assert optimizer.diagnostics(per_layer=False)["actual_change"] == pytest.approx(change, abs=1e-10)


# Several processes.


class TwoHeads(nn.Module):
    """Of which the loop sees a dictionary, or one tensor."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.class_, self.size = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 2)
        self.together = together

    def forward(self, x: Tensor) -> Any:
        h = self.body(x).tanh()
        heads = self.class_(h), self.size(h)
        return torch.cat(heads, 1) if self.together else dict(zip(("class", "size"), heads, strict=True))


def halves(out: Any) -> dict[str, Tensor]:
    return out if isinstance(out, dict) else {"class": out[:, :3], "size": out[:, 3:]}


def train_two_heads(size: int, together: bool) -> Tensor:
    """Parameters after five steps, of one process or of one among several."""
    torch.set_default_dtype(torch.float64)
    model = TwoHeads(together)
    wrapped = DistributedDataParallel(model) if size > 1 else model
    share = slice(dist.get_rank() if size > 1 else 0, None, size)
    told = {"class": "cross_entropy", "size": (0.5, "mse")}
    optimizer = natgrad.KFAC(wrapped, told, fisher="exact", batch_fraction=1.0, output=halves)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(24, 5, generator=generator)[share]
        optimizer.zero_grad()
        out = halves(wrapped(x))
        (cross_entropy(out["class"], x[:, :3].argmax(1)) + 0.5 * mse_loss(out["size"], x[:, :2].sin())).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("together", [True, False])
def test_ranks_take_the_steps_of_one_process(together: bool) -> None:
    for one in ranks.run(train_two_heads, 2, 2, together):
        assert torch.allclose(one, train_two_heads(1, together), rtol=1e-9, atol=1e-12)


# What is refused.


@pytest.mark.parametrize(
    ("declared", "error", "text"),
    [
        ({}, ValueError, "not none at all"),
        ({"a": "mse", "b": nn.MSELoss(reduction="sum")}, ValueError, "must all be sums over the data, or all means"),
        ({"a": (0.0, "mse")}, ValueError, "`loss` of output 'a' must be a loss or a pair of a positive number"),
        ({"a": ("mse", "mse")}, ValueError, "`loss` of output 'a' must be a loss or a pair of a positive number"),
        (["mse", None], TypeError, "`loss` of output 1 must be the loss of one tensor, not None"),
        ({"a": {"b": "mse"}}, TypeError, "`loss` of output 'a' must be the loss of one tensor"),
        ({"a": "l1"}, ValueError, "`loss='l1'` is not known"),
        ({"a": nn.CrossEntropyLoss(weight=torch.ones(3))}, ValueError, 'serves as well in most cases: "cross_entropy"'),
        ({"a": nn.KLDivLoss(reduction="batchmean")}, ValueError, "most cases: natgrad.likelihoods.LogCategorical("),
        ({"a": nn.HuberLoss()}, ValueError, 'serves as well in most cases: "mse"'),
        ((0.5, "mse"), TypeError, "of output 0 must be the loss of one tensor, not 0.5"),
    ],
)
def test_losses_that_cannot_be_declared_together(declared: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        resolve(declared)
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("returned", "error", "text"),
    [
        ({"class": torch.zeros(4, 3)}, TypeError, "output 'size', and there is no such tensor in ['class']"),
        ([torch.zeros(4, 3)], TypeError, "output 'class', and there is no such tensor in list"),
        (torch.zeros(4, 3), TypeError, "output 'class', and there is no such tensor in Tensor"),
        ({**several(), "size": 3.0}, TypeError, "an output 'size'"),
        ({**several(), "class": torch.zeros(4)}, ValueError, "needs logits of shape (N, classes, …)"),
    ],
)
def test_outputs_that_are_not_as_declared(returned: Any, error: type[Exception], text: str) -> None:
    likelihood = resolve(DECLARED).likelihood
    assert isinstance(likelihood, Joint)
    with pytest.raises(error) as raised:
        likelihood.heads(returned)
    assert text in str(raised.value)


def test_it_is_told_by_its_name() -> None:
    told = repr(Joint({"a": Part(0.5, Gaussian()), 1: Part(1.0, Poisson())}))
    assert told == "Joint('a': 0.5 * Gaussian(reduction='mean'), 1: 1 * Poisson(reduction='mean'))"


@pytest.mark.parametrize("damping", ["auto", 0.1])
def test_micro_batches_may_have_other_shapes(damping: Any) -> None:
    """The largest tells how far to go, whichever came last; catches heads that are cut as the latest were."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"class": self.a(x).movedim(-1, 1), "size": self.b(x)}

    steps = []
    for order in (1, -1):
        torch.manual_seed(0)
        model = Positions()
        optimizer = natgrad.KFAC(model, {"class": "cross_entropy", "size": "mse"}, fisher="exact", damping=damping)
        for _ in range(3):
            optimizer.zero_grad()
            for data, positions in [(40, 10), (30, 12)][::order]:
                x = torch.randn(data, positions, 5, generator=torch.Generator().manual_seed(data))
                out = model(x)
                value = cross_entropy(out["class"], (x[..., 0] > 0).long()) + mse_loss(out["size"], x[..., :2])
                (value / 2).backward()
            optimizer.step()
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*steps, rtol=1e-9, atol=1e-12)


def test_smoothed_labels_weigh_as_others_do() -> None:
    """The curvature of their cross-entropy is that without smoothing, whatever the targets."""
    model, x, y = Heads(), torch.randn(60, 5, generator=torch.Generator().manual_seed(3)), targets(60)
    twin = copy.deepcopy(model)
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    factors = []
    for one, told in ((model, {**DECLARED, "class": smoothed}), (twin, DECLARED)):
        preconditioner = natgrad.Preconditioner(one, told, fisher="exact", damping=0.1)
        loss(one(x), y).backward()
        preconditioner.update()
        factors.append(preconditioner.factors())
    for name, (A, G) in factors[0].items():
        assert torch.equal(A, factors[1][name][0])
        assert torch.equal(G, factors[1][name][1])
