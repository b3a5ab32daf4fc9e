"""What natgrad says that it does with each parameter."""

import contextlib
import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad.fingerprint import fingerprint
from natgrad.layers.base import registered
from natgrad.report import Row, format_table

TIED = "tied modules must be of one kind, share weight and bias alike and have one padding_idx"


class Mixed(nn.Module):
    """A layer, and every reason not to be one."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.frozen, self.partly = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.left = nn.Linear(4, 4, bias=False)
        self.right = nn.Linear(4, 4)
        self.right.weight = self.left.weight
        self.norm, self.slope = nn.LayerNorm(4), nn.PReLU(4)
        self.scale = nn.Parameter(self.norm.weight.detach().clone())
        self.frozen.requires_grad_(False)
        self.partly.bias.requires_grad_(False)


def rows(model: nn.Module) -> dict[str, Row]:
    return {row.name: row for row in natgrad.describe(model).rows}


def test_every_parameter_is_accounted_for_with_its_reason() -> None:
    described = rows(Mixed())
    reasons = {name: row.reason for name, row in described.items()}
    assert reasons == {
        "plain": "",
        "partly": "",
        "norm": "",
        "scale": "no layer kind is registered for Mixed",
        "frozen.weight": "frozen (requires_grad=False)",
        "frozen.bias": "frozen (requires_grad=False)",
        "partly.bias": "frozen (requires_grad=False)",
        "left.weight": f"the weight is shared by left, right: {TIED}",
        "right.bias": f"the weight is shared by left, right: {TIED}",
        "slope.weight": "no layer kind is registered for PReLU",
    }
    assert described["plain"] == Row("plain", "K-FAC Linear", ("4", "4"), 16, 384, described["plain"].cost, "")
    assert described["left.weight"].kind == "fallback"
    assert described["partly.bias"].kind == described["frozen.weight"].kind == "nothing"


def test_costs_are_shares_by_the_cubes_of_the_sizes() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 5, bias=False), nn.PReLU())
    costs = [row.cost for row in natgrad.describe(model).rows]
    assert costs == pytest.approx([35 / 168, 133 / 168, 0.0])


def test_kfac_trains_what_the_table_says() -> None:
    """A parameter in neither group would never move, one in both would move twice."""
    model = Mixed()
    layers, rest = (group["params"] for group in natgrad.KFAC(model, "mse").param_groups)
    trained = [model.plain.weight, model.plain.bias, model.partly.weight, model.norm.weight, model.norm.bias]
    assert [id(p) for p in layers] == [id(p) for p in trained]
    named = {name for name, p in model.named_parameters() if any(p is q for q in rest)}
    assert named == {name for name, row in rows(model).items() if row.kind == "fallback"}
    assert len(rest) == len(set(rest))


def test_strict_refuses_fallbacks_and_not_frozen_parameters() -> None:
    with pytest.raises(ValueError, match=r"have no Kronecker-factored block:\n(.*\n)*  slope.weight: no layer kind is"):
        natgrad.describe(Mixed(), strict=True)
    natgrad.describe(nn.Linear(3, 2).requires_grad_(False), strict=True)


def test_the_table_reads_like_this() -> None:
    model = nn.Sequential(
        nn.Linear(3, 400),
        nn.PReLU(400),
        nn.Linear(400, 10, bias=False),
        nn.Embedding(20_000, 4),
        nn.Conv1d(4, 6, 3, groups=2),
    )
    assert str(natgrad.describe(model)).splitlines() == [
        "layer     handled by           G           A  parameters    memory  cost  why not K-FAC",
        "0         K-FAC Linear       400           4       1,600    1.3 MB   50%",
        "2         K-FAC Linear        10         400       4,000    1.3 MB   50%",
        "3         K-FAC Embedding      4  20000 diag      80,000  800.1 kB    0%",
        "4         K-FAC Conv1d     2 x 3       2 x 7          42    1.3 kB    0%",
        "1.weight  fallback                                   400    3.2 kB        no layer kind is registered for "
        "PReLU",
        "all                                               86,042    3.4 MB",
    ]


def held() -> dict[int, Tensor]:
    """A tensor for each piece of memory that some tensor holds, by where it is; of those that have memory."""
    gc.collect()
    found = {}
    for tensor in [t for t in gc.get_objects() if issubclass(type(t), Tensor)]:
        with contextlib.suppress(RuntimeError):
            found[tensor.untyped_storage().data_ptr()] = tensor
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_memory_is_what_is_held_between_steps(dtype: torch.dtype) -> None:
    """Catches a tensor that is not counted, and anything of a batch that is not let go of: sums, samples, outputs."""
    model = nn.Sequential(nn.Conv1d(4, 14, 3, groups=2), nn.PReLU(14), nn.Flatten(), nn.Linear(70, 9), nn.Linear(9, 9))
    model.to(dtype)
    fingerprint(torch.empty(600, 4, 7))  # which keeps the places that it looks at, once for all optimizers
    before = held()
    optimizer = natgrad.KFAC(model, nn.MSELoss())
    for step in range(3):
        x, y = torch.randn(600, 4, 7, dtype=dtype), torch.randn(600, 9, dtype=dtype)
        optimizer.zero_grad()
        optimizer.preconditioner.loss.function(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        del x, y
        kept = [t.untyped_storage().nbytes() for place, t in held().items() if place not in before]
        # Ages, noise and counts of steps are smaller.
        assert sum(size for size in kept if size > 24) == natgrad.describe(model).memory, step


def test_factors_that_are_too_large_for_the_other_one_are_diagonals() -> None:
    """Catches nine thousand parameters with two inverses of 3,000 dimensions."""
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise([1, 2700, 200, 2500, 1])])
    expected = [("2700 diag", "2"), ("200", "2701"), ("2500", "201"), ("1", "2501")]
    assert [row.factors for row in natgrad.describe(model).rows] == expected


def test_a_model_that_is_a_layer_and_one_without_parameters() -> None:
    assert rows(nn.Linear(3, 2)) == {"": Row("", "K-FAC Linear", ("2", "4"), 8, 224, 1.0, "")}
    assert rows(nn.Tanh()) == {}


@pytest.mark.parametrize(
    ("base", "own", "is_base"),
    [
        (nn.Linear, {}, True),
        (nn.Linear, {"reset_parameters": lambda self: None, "extra_repr": lambda self: "mine", "name": "mine"}, True),
        (nn.Linear, {"forward": lambda self, x: x}, False),
        (nn.Conv1d, {"_conv_forward": lambda self, *args: args[0]}, False),
        (nn.Conv1d, {"__call__": lambda self, x: x}, False),
        (nn.Bilinear, {}, False),
    ],
)
def test_a_subclass_is_taken_for_its_base_only_where_it_computes_the_same(
    base: type[nn.Module], own: dict[str, Any], is_base: bool
) -> None:
    kind = type("Masked", (base,), own)
    layer = kind(3, 2, 1)
    assert (registered(layer) is registered(base(3, 2, 1)) is not None) == is_base
    if not is_base:
        assert rows(nn.Sequential(layer))["0.weight"].reason == "no layer kind is registered for Masked"


def test_the_output_projection_of_attention_belongs_to_the_attention() -> None:
    """It is a subclass of nn.Linear with nothing of its own, and is never called."""
    assert registered(nn.MultiheadAttention(4, 2).out_proj) is None


@pytest.mark.parametrize(("right", "expected"), [(set(), ["a    bcd", "efg  h"]), ({0, 1}, ["  a  bcd", "efg    h"])])
def test_columns_are_as_wide_as_their_widest_cell(right: set[int], expected: list[str]) -> None:
    assert format_table([("a", "bcd"), ("efg", "h")], right).splitlines() == expected
