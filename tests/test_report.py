"""What natgrad says that it does with each parameter."""

import pytest
from torch import nn

import natgrad
from natgrad.report import Row, format_table


class Mixed(nn.Module):
    """A layer, and every reason not to be one."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.frozen, self.partly = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.left = nn.Linear(4, 4, bias=False)
        self.right = nn.Linear(4, 4)
        self.right.weight = self.left.weight
        self.norm = nn.LayerNorm(4)
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
        "scale": "no layer kind is registered for Mixed",
        "frozen.weight": "weight and bias frozen (requires_grad=False)",
        "frozen.bias": "weight and bias frozen (requires_grad=False)",
        "partly.weight": "bias frozen (requires_grad=False)",
        "partly.bias": "bias frozen (requires_grad=False)",
        "left.weight": "weight is shared by the modules left, right",
        "right.weight": "weight is shared by the modules left, right",
        "right.bias": "weight is shared by the modules left, right",
        "norm.weight": "no layer kind is registered for LayerNorm",
        "norm.bias": "no layer kind is registered for LayerNorm",
    }
    assert described["plain"] == Row("plain", "K-FAC Linear", (4, 4), 16, "")
    assert described["partly.weight"].kind == "fallback"
    assert described["partly.bias"].kind == described["frozen.weight"].kind == "nothing"


def test_kfac_trains_what_the_table_says() -> None:
    """A parameter in neither group would never move, one in both would move twice."""
    model = Mixed()
    layers, rest = (group["params"] for group in natgrad.KFAC(model, "mse").param_groups)
    assert layers == [model.plain.weight, model.plain.bias]
    named = {name for name, p in model.named_parameters(remove_duplicate=False) if any(p is q for q in rest)}
    assert named == {name for name, row in rows(model).items() if row.kind == "fallback"}
    assert len(rest) == len(set(rest))


def test_the_table_reads_like_this() -> None:
    model = nn.Sequential(nn.Linear(3, 400), nn.LayerNorm(400), nn.Linear(400, 10, bias=False))
    assert str(natgrad.describe(model)).splitlines() == [
        "layer     handled by      G    A  parameters  why not K-FAC",
        "0         K-FAC Linear  400    4       1,600",
        "2         K-FAC Linear   10  400       4,000",
        "1.weight  fallback                       400  no layer kind is registered for LayerNorm",
        "1.bias    fallback                       400  no layer kind is registered for LayerNorm",
    ]


def test_a_model_that_is_a_layer_and_one_without_parameters() -> None:
    assert rows(nn.Linear(3, 2)) == {"": Row("", "K-FAC Linear", (2, 4), 8, "")}
    assert rows(nn.Tanh()) == {}


def test_a_subclass_is_not_taken_for_its_base() -> None:
    """Its forward may be anything."""

    class Masked(nn.Linear):
        pass

    assert rows(nn.Sequential(Masked(3, 2)))["0.weight"].reason == "no layer kind is registered for Masked"


@pytest.mark.parametrize(("right", "expected"), [(set(), ["a    bcd", "efg  h"]), ({0, 1}, ["  a  bcd", "efg    h"])])
def test_columns_are_as_wide_as_their_widest_cell(right: set[int], expected: list[str]) -> None:
    assert format_table([("a", "bcd"), ("efg", "h")], right).splitlines() == expected
