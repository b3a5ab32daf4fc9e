"""Rows of every layer kind reproduce the gradient: Σ over calls of gᵀ x, a 1 appended to x, is the matrix of ∂loss/∂P.

A patch in the wrong order, a lost padding, a transposed weight or a call that was missed shows here.
"""

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from layer_modules import Attention, Conv1D, Language, Loop, Repeated, Sequence, Twins, frozen, normalized, randomized
from natgrad.layers import Layer, partition
from natgrad.layers.embedding import EmbeddingLayer
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")
some_examples = hypothesis.settings(max_examples=30, deadline=None, derandomize=True)


class Recorded:
    """A recorder that keeps everything, the gradients from an ordinary backward pass."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def wants(self, layers: Any) -> bool:
        return True

    def record(
        self, layer: Layer, x: Tensor, z: Tensor, blocks: slice = slice(None), source: Tensor | None = None
    ) -> None:
        call = {"layer": layer, "x": x.clone(), "blocks": blocks}
        z.register_hook(lambda g: call.update(g=g))
        self.calls.append(call)


def one_call(call: dict[str, Any]) -> Tensor:
    """Σ g xᵀ of one call, ([b,] out, in [+ 1])."""
    layer: Layer = call["layer"]
    g, x = layer.gradients(call["g"], call["x"]), layer.inputs(call["x"])
    assert g.shape[:-1] == (x.shape[:-1] if g.ndim == x.ndim else (g.shape[0], *x.shape[:-1]))
    if isinstance(layer, EmbeddingLayer):  # whose rows are tokens
        x = nn.functional.one_hot(x.squeeze(-1), layer.module.num_embeddings).to(g.dtype)
    if layer.has_bias:
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    return g.flatten(-3, -2).mT @ x.flatten(-3, -2)


def check(
    model: nn.Module, *inputs: Tensor, names: set[str] | None = None, fallback: frozenset[str] = frozenset()
) -> None:
    """That the rows reproduce the gradient of every layer, and that matrix and parameters translate."""
    parts, recorded = partition(model), Recorded()
    assert {name for name, reason in parts.reasons.items() if not reason.startswith("frozen")} == fallback
    assert names is None or {layer.name for layer in parts.layers} == names
    handles = [handle for layer in parts.layers for handle in layer.watch(recorded)]
    output = model(*inputs)
    torch.manual_seed(1)
    (output * torch.randn_like(output)).sum().backward()
    totals: dict[str, Tensor] = {}
    for layer in parts.layers:
        out, width = layer.shape
        totals[layer.name] = torch.zeros(out, width) if layer.blocks is None else torch.zeros(layer.blocks, out, width)
    for call in recorded.calls:
        M, owner = one_call(call), call["layer"].owner
        M = M.mT if owner.swaps(call["layer"]) else M
        totals[owner.name][call["blocks"]][..., : M.shape[-1]] += M  # an embedding has no bias
    for layer in parts.layers:
        gradients = [parameter.grad for parameter in layer.parameters]
        matrix = layer.to_matrix(gradients)
        assert matrix.shape == totals[layer.name].shape
        assert relative_error(totals[layer.name], matrix) < 1e-12, layer.name
        assert matrix.norm() > 0, layer.name
        check_translation(layer, gradients)
    for handle in handles:
        handle.remove()


def check_translation(layer: Layer, gradients: list[Tensor]) -> None:
    """⟨∂θ, dθ⟩ = ⟨∂M, dM⟩ for any step dM of the matrix; and back and forth is the identity."""
    matrix = layer.to_matrix(gradients)
    step = torch.randn_like(matrix)
    steps = layer.from_matrix(step)
    assert [t.shape for t in steps] == [p.shape for p in layer.parameters]
    product = sum((s * g).sum() for s, g in zip(steps, gradients, strict=True))
    assert torch.allclose(product, (step * matrix).sum())
    assert torch.allclose(layer.step_to_matrix(steps), step)


def tokens(*shape: int, size: int = 7) -> Tensor:
    return torch.randint(size, shape)


Make = Callable[[], tuple[Any, ...]]
"""Makes a module and its inputs."""

LINEAR: dict[str, Make] = {
    "linear": lambda: (nn.Linear(3, 4), torch.randn(5, 3)),
    "no bias": lambda: (nn.Linear(3, 4, bias=False), torch.randn(5, 3)),
    "frozen bias": lambda: (frozen(nn.Linear(3, 4), "bias"), torch.randn(5, 3)),
    "positions": lambda: (nn.Linear(3, 4), torch.randn(5, 2, 6, 3)),
    "one vector": lambda: (nn.Linear(3, 4), torch.randn(3)),
    "repeated": lambda: (Repeated(nn.Linear(3, 3)), torch.randn(5, 3)),
    "twins": lambda: (Twins(lambda: nn.Linear(3, 3)), torch.randn(5, 3)),
    "twins without bias": lambda: (Twins(lambda: nn.Linear(3, 3, bias=False)), torch.randn(5, 6, 3)),
    "weight norm": lambda: (normalized(nn.Linear(3, 4)), torch.randn(5, 3)),
    "weight norm, no bias": lambda: (normalized(nn.Linear(3, 4, bias=False)), torch.randn(5, 3)),
    "Conv1D": lambda: (Conv1D(4, 3), torch.randn(5, 6, 3)),
    "Conv1D, frozen bias": lambda: (frozen(Conv1D(4, 3), "bias"), torch.randn(5, 6, 3)),
}
EMBEDDING: dict[str, Make] = {
    "embedding": lambda: (nn.Embedding(7, 4), tokens(5, 6)),
    "one token": lambda: (nn.Embedding(7, 4), tokens(5)),
    "two axes": lambda: (nn.Embedding(7, 4), tokens(5, 2, 3)),
    "padding": lambda: (nn.Embedding(7, 4, padding_idx=2), tokens(5, 6)),
    "last is padding": lambda: (nn.Embedding(7, 4, padding_idx=-1), tokens(5, 6)),
    "tied": lambda: (Language(), tokens(5, 6)),
    "tied, bias": lambda: (Language(bias=True), tokens(5, 6)),
    "two tables in one": lambda: (TwoTables(), tokens(5, 6)),
}
CONVOLUTION: dict[str, Make] = {
    "weight norm": lambda: (normalized(nn.Conv2d(3, 4, 2, groups=1)), torch.randn(3, 3, 5, 4)),
    "weight norm, groups": lambda: (normalized(nn.Conv1d(4, 6, 2, groups=2)), torch.randn(3, 4, 5)),
    "weight norm, transposed": lambda: (normalized(nn.ConvTranspose1d(4, 6, 2, groups=2)), torch.randn(3, 4, 5)),
    "twins": lambda: (Twins(lambda: nn.Conv1d(4, 4, 3, groups=2, padding=1)), torch.randn(3, 4, 5)),
    "channels last": lambda: (
        nn.Conv2d(4, 6, 3, stride=2, groups=2).to(memory_format=torch.channels_last),
        torch.randn(3, 4, 9, 8).to(memory_format=torch.channels_last),
    ),
    "channels last, transposed": lambda: (
        nn.ConvTranspose2d(4, 6, 3, stride=2).to(memory_format=torch.channels_last),
        torch.randn(3, 4, 5, 4).to(memory_format=torch.channels_last),
    ),
    "depthwise": lambda: (nn.Conv2d(4, 8, 3, groups=4, bias=False), torch.randn(3, 4, 6, 5)),
    "frozen bias": lambda: (frozen(nn.Conv2d(4, 6, 3, groups=2), "bias"), torch.randn(3, 4, 6, 5)),
    "frozen bias, transposed": lambda: (
        frozen(nn.ConvTranspose2d(4, 6, 3, groups=2), "bias"),
        torch.randn(3, 4, 5, 4),
    ),
}
NORM: dict[str, Make] = {
    "layer norm": lambda: (randomized(nn.LayerNorm(4)), torch.randn(5, 4)),
    "layer norm, positions": lambda: (randomized(nn.LayerNorm(4)), torch.randn(5, 6, 4)),
    "layer norm, two axes": lambda: (randomized(nn.LayerNorm((4, 3))), torch.randn(5, 2, 4, 3)),
    "layer norm, no bias": lambda: (randomized(nn.LayerNorm(4, bias=False)), torch.randn(5, 6, 4)),
    "layer norm, many channels": lambda: (randomized(nn.LayerNorm(600)), torch.randn(5, 2, 600)),
    "rms norm": lambda: (randomized(nn.RMSNorm(4)), torch.randn(5, 6, 4)),
    "rms norm, many channels": lambda: (randomized(nn.RMSNorm(1100)), torch.randn(3, 1100)),
    "rms norm, eps": lambda: (randomized(nn.RMSNorm((3, 4), eps=0.1)), torch.randn(5, 3, 4)),
    "group norm": lambda: (randomized(nn.GroupNorm(2, 4, eps=0.1)), torch.randn(5, 4, 3, 2)),
    "group norm, vectors": lambda: (randomized(nn.GroupNorm(2, 4)), torch.randn(5, 4)),
    "batch norm 1d": lambda: (randomized(nn.BatchNorm1d(4)), torch.randn(5, 4)),
    "batch norm 1d, positions": lambda: (randomized(nn.BatchNorm1d(4)), torch.randn(5, 4, 6)),
    "batch norm 2d": lambda: (randomized(nn.BatchNorm2d(4, eps=0.1)), torch.randn(5, 4, 3, 2)),
    "batch norm 3d": lambda: (randomized(nn.BatchNorm3d(4)), torch.randn(5, 4, 3, 2, 2)),
    "batch norm, many channels": lambda: (randomized(nn.BatchNorm2d(600)), torch.randn(5, 600, 2, 1)),
    "batch norm, eval": lambda: (randomized(nn.BatchNorm2d(4)).eval(), torch.randn(5, 4, 3, 2)),
    "batch norm, no running statistics": lambda: (
        randomized(nn.BatchNorm2d(4, track_running_stats=False)).eval(),
        torch.randn(5, 4, 3, 2),
    ),
    "frozen shift": lambda: (frozen(randomized(nn.LayerNorm(4)), "bias"), torch.randn(5, 6, 4)),
    "frozen scale": lambda: (frozen(randomized(nn.BatchNorm1d(4)), "weight"), torch.randn(5, 4)),
    "frozen scale, many channels": lambda: (frozen(randomized(nn.LayerNorm(1100)), "weight"), torch.randn(5, 1100)),
    "twins": lambda: (Twins(lambda: nn.LayerNorm(4)), torch.randn(5, 6, 4)),
}
CELL = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class TwoTables(nn.Module):
    """Tokens and their successors from one table."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(7, 4, padding_idx=2), nn.Embedding(7, 4, padding_idx=2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.second((x + 1) % 7)


def table(cases: dict[str, Make]) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("make", cases.values(), ids=cases.keys())


@table(LINEAR)
def test_linear(make: Make) -> None:
    torch.manual_seed(0)
    check(*make())


@table(EMBEDDING)
def test_embedding(make: Make) -> None:
    torch.manual_seed(0)
    check(*make())


@table(CONVOLUTION)
def test_convolution(make: Make) -> None:
    torch.manual_seed(0)
    check(*make())


@table(NORM)
def test_norm(make: Make) -> None:
    torch.manual_seed(0)
    check(*make())


PADDING_MODES = ["zeros", "circular", "reflect", "replicate"]


@some_examples
@hypothesis.given(data=st.data(), axes=st.sampled_from([1, 2, 3]), bias=st.booleans())
def test_convolutions_of_any_shape(data: st.DataObject, axes: int, bias: bool) -> None:
    each = st.tuples(*[st.integers(1, 3)] * axes)
    size, stride, dilation = data.draw(each), data.draw(each), data.draw(each)
    groups, width, out = (data.draw(st.integers(1, 2)) for _ in range(3))
    padding: Any = data.draw(st.one_of(st.sampled_from(["valid", "same"]), st.tuples(*[st.integers(0, 2)] * axes)))
    mode = data.draw(st.sampled_from(PADDING_MODES if padding != "valid" else ["zeros"]))
    if padding == "same":
        stride = (1,) * axes
    # Wide enough for one patch without padding, and for reflections.
    spatial = [max(3, d * (k - 1) + 1) + data.draw(st.integers(0, 2)) for k, d in zip(size, dilation, strict=True)]
    if padding == "same":
        hypothesis.assume(all(d * (k - 1) < n for k, d, n in zip(size, dilation, spatial, strict=True)))
    kind: Any = [nn.Conv1d, nn.Conv2d, nn.Conv3d][axes - 1]
    if mode == "reflect" and axes == 3:
        mode = "circular"
    torch.manual_seed(0)
    module = kind(groups * width, groups * out, size, stride, padding, dilation, groups, bias, mode)
    check(module, torch.randn(2, groups * width, *spatial))


@some_examples
@hypothesis.given(data=st.data(), axes=st.sampled_from([1, 2, 3]), bias=st.booleans())
def test_transposed_convolutions_of_any_shape(data: st.DataObject, axes: int, bias: bool) -> None:
    each = st.tuples(*[st.integers(1, 3)] * axes)
    size, stride, dilation = data.draw(each), data.draw(each), data.draw(each)
    groups, width, out = (data.draw(st.integers(1, 2)) for _ in range(3))
    padding = data.draw(st.tuples(*[st.integers(0, 3)] * axes))  # more than the kernel, too, which cuts
    extra = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    spatial = data.draw(st.tuples(*[st.integers(2, 4)] * axes))
    geometry = zip(spatial, size, stride, padding, dilation, extra, strict=True)
    hypothesis.assume(all((n - 1) * s - 2 * p + d * (k - 1) + e + 1 > 0 for n, k, s, p, d, e in geometry))
    kind: Any = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][axes - 1]
    torch.manual_seed(0)
    module = kind(groups * width, groups * out, size, stride, padding, extra, groups, bias, dilation)
    check(module, torch.randn(2, groups * width, *spatial))


def mask(*shape: int) -> Tensor:
    """Forbids some, never the first."""
    forbidden = torch.rand(shape) < 0.4
    forbidden[..., 0] = False
    return forbidden


def in_one_buffer(model: nn.Module) -> nn.Module:
    """Its parameters are views of one tensor, as where they are exchanged or updated as one."""
    parameters = list(model.parameters())
    buffer = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view_as(p)
    return model


ATTENTION: dict[str, Make] = {
    "self": lambda: (Attention(), torch.randn(5, 3, 8)),
    "batch first": lambda: (Attention(batch_first=True), torch.randn(3, 5, 8)),
    "no batch": lambda: (Attention(), torch.randn(5, 8)),
    "no bias": lambda: (Attention(bias=False, batch_first=True), torch.randn(3, 5, 8)),
    "one head": lambda: (Attention(heads=1), torch.randn(5, 3, 8)),
    "cross": lambda: (Attention(batch_first=True), torch.randn(3, 5, 8), torch.randn(3, 4, 8)),
    "cross, sequence first": lambda: (Attention(), torch.randn(5, 3, 8), torch.randn(4, 3, 8)),
    "three inputs": lambda: (Attention(), torch.randn(5, 3, 8), torch.randn(4, 3, 8), torch.randn(4, 3, 8)),
    "no weights": lambda: (Attention(call={"need_weights": False}), torch.randn(5, 3, 8)),
    "mask": lambda: (Attention(call={"attn_mask": mask(5, 5)}), torch.randn(5, 3, 8)),
    "padding": lambda: (Attention(call={"key_padding_mask": mask(3, 5)}), torch.randn(5, 3, 8)),
    "causal": lambda: (
        Attention(call={"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True, "need_weights": False}),
        torch.randn(5, 3, 8),
    ),
    "dropout": lambda: (Attention(dropout=0.5), torch.randn(5, 3, 8)),
    "zero attention": lambda: (Attention(add_zero_attn=True), torch.randn(5, 3, 8)),
    "frozen bias": lambda: (frozen(Attention(), "attention.in_proj_bias"), torch.randn(5, 3, 8)),
    "frozen in": lambda: (frozen(Attention(bias=False), "attention.in_proj_weight"), torch.randn(5, 3, 8)),
    "frozen out": lambda: (frozen(Attention(bias=False), "attention.out_proj.weight"), torch.randn(5, 3, 8)),
    "repeated": lambda: (Repeated(Attention(batch_first=True)), torch.randn(3, 5, 8)),
    "in one buffer": lambda: (in_one_buffer(Attention()), torch.randn(5, 3, 8)),
}


@table(ATTENTION)
def test_attention(make: Make) -> None:
    torch.manual_seed(0)
    check(*make())


@pytest.mark.parametrize("options", [{"kdim": 6, "vdim": 6}, {"kdim": 6, "vdim": 5}, {"vdim": 5}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_attention_over_other_sizes(options: dict[str, int], bias: bool) -> None:
    """Three weights whose bias is one parameter: it is no layer's."""
    torch.manual_seed(0)
    model = Attention(bias=bias, **options)
    key, value = torch.randn(4, 3, options.get("kdim", 8)), torch.randn(4, 3, options.get("vdim", 8))
    check(model, torch.randn(5, 3, 8), key, value, fallback=frozenset({"attention.in_proj_bias"} if bias else ()))


def test_attention_with_a_learned_position() -> None:
    torch.manual_seed(0)
    bias_kv = frozenset({"attention.bias_k", "attention.bias_v"})
    check(Attention(add_bias_kv=True), torch.randn(5, 3, 8), fallback=bias_kv)


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"batch_first": True, "bidirectional": True, "num_layers": 2},
        {"num_layers": 3, "dropout": 0.5},
    ],
    ids=str,
)
def test_recurrent(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    check(Sequence(RECURRENT[kind](3, 2, **options)), torch.randn(4, 5, 3))


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
def test_recurrent_with_a_frozen_parameter(name: str) -> None:
    torch.manual_seed(0)
    check(Sequence(frozen(nn.LSTM(3, 2, num_layers=2, bias="bias" in name), name)), torch.randn(4, 5, 3))


@pytest.mark.parametrize("kind", CELL)
@pytest.mark.parametrize("bias", [True, False])
def test_cells(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    check(Loop(CELL[kind](3, 2, bias=bias)), torch.randn(4, 5, 3))


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_cells_with_a_frozen_parameter(name: str) -> None:
    torch.manual_seed(0)
    check(Loop(frozen(nn.GRUCell(3, 2, bias="bias" in name), name)), torch.randn(4, 5, 3))
