"""Compiled models, checkpointed activations and devices: what is around the layers changes nothing."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import natgrad
from natgrad.inverses import INVERSES
from rank_cases import Case, batch, network

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf"
    ),  # looked at by the compiler
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]
COMPILED = "`torch.compile` returned"


class Graphs:
    """A backend of torch.compile that counts what it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        self.count += 1
        return graph.forward


class Checkpointed(nn.Module):
    """Activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.net, self.reentrant = network(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for part in self.net:
            x = part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)
        return x


def train(model: nn.Module, inner: nn.Module, fisher: str = "exact", period: int = 1) -> Tensor:
    """The parameters after six steps."""
    optimizer = natgrad.KFAC(model, "mse", fisher=fisher, curvature_period=period, inverse_period=period)
    for step in range(6):
        x, y = batch(step, Case())
        optimizer.zero_grad()
        mse_loss(model(x.requires_grad_()), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in inner.parameters()])


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_compiled_model_takes_the_same_steps_in_one_graph(fisher: str, period: int) -> None:
    """``fullgraph`` raises where a hook of ours breaks the graph; a hook that is missed leaves no factors."""
    torch.compiler.reset()
    plain, graphs = network(), Graphs()
    inner = copy.deepcopy(plain)
    compiled = torch.compile(inner, backend=graphs, fullgraph=True)
    assert torch.equal(train(compiled, inner, fisher, period), train(plain, plain, fisher, period))
    assert graphs.count == (0 if period == 1 else 1)


def test_compiled_parts_keep_the_names_of_their_layers() -> None:
    torch.compiler.reset()
    plain, parts, graphs = network(), network(), Graphs()
    parts[2] = torch.compile(parts[2], backend=graphs, fullgraph=True)
    assert [row.name for row in natgrad.describe(parts).rows][:3] == ["0", "2.1", "3"]
    assert torch.equal(train(parts, parts, period=3), train(plain, plain, period=3))
    assert graphs.count == 1


def test_a_model_compiled_in_place_is_refused_with_the_way_out() -> None:
    torch.compiler.reset()
    model = network()
    model.compile(backend="eager")
    with pytest.raises(RuntimeError, match=COMPILED):
        train(model, model)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical", "forward"])
def test_checkpointed_activations_count_once(fisher: str) -> None:
    plain, again = Checkpointed(None), Checkpointed(False)
    assert torch.equal(train(again, again, fisher), train(plain, plain, fisher))


def test_reentrant_checkpoints_are_refused_with_the_way_out() -> None:
    model = Checkpointed(True)
    with pytest.raises(RuntimeError, match="`use_reentrant=False`"):
        train(model, model)


@pytest.mark.parametrize("inverse", ["eigen", "ekfac"])
@pytest.mark.parametrize("fisher", ["exact", "empirical", "forward"])
def test_everything_stays_on_the_device_of_the_model(fisher: str, inverse: str) -> None:
    """A constant made on the CPU would not mix with tensors that have no storage."""
    if (fisher, inverse) == ("forward", "ekfac"):
        pytest.skip("needs gradients")
    model = network().to("meta")
    preconditioner = natgrad.Preconditioner(model, "mse", fisher=fisher, damping=0.1, inverse=inverse)
    x, y = (t.to("meta") for t in batch(0, Case()))
    mse_loss(model(x), y).backward()
    gathered = preconditioner.capture.take()
    for layer in preconditioner.layers:
        factors = gathered.factors(layer)
        assert factors is not None
        damping = preconditioner.metric.rule(*factors, None)  # type: ignore[arg-type]
        state = INVERSES[inverse].factorize(*factors, damping)
        gradients = [p.grad for p in layer.parameters if p.grad is not None]
        solution = INVERSES[inverse].solve(state, layer.to_matrix(gradients))
        assert {t.device.type for t in (*factors, solution)} == {"meta"}
