"""What a preconditioner refuses when it is constructed, and what it says then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import natgrad
from linear_cases import stack

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(
    "options",
    [
        {"fisher": "true"},
        {"inverse": "lu"},
        {"damping": -1.0},
        {"damping": "large"},
        {"damping": True},
        {"kl_clip": 0.0},
        {"kl_clip": "auto"},
        {"kl_clip": float("nan")},
        {"mc_samples": 0},
        {"mc_samples": 1.5},
        {"mc_samples": True},
        {"factor_decay": 1.0},
        {"factor_decay": -0.1},
        {"factor_decay": "slow"},
        {"curvature_period": 0},
        {"curvature_period": "2"},
        {"inverse_period": 0},
        {"batch_fraction": 0.0},
        {"batch_fraction": 1.1},
        {"batch_fraction": "half"},
        {"sharing": "sum"},
        {"sharing": {"1": "reduce"}},
        {"output": "logits"},
        {"seed": 1.5},
        {"loss": "nll"},
    ],
    ids=repr,
)
def test_keywords_out_of_range_are_named(options: dict[str, Any]) -> None:
    (name, value), loss = next(iter(options.items())), options.get("loss", "mse")
    with pytest.raises(ValueError, match=rf"`{name}\b") as raised:
        natgrad.Preconditioner(stack([3, 4, 2]), loss, **{k: v for k, v in options.items() if k != "loss"})
    assert repr(value) in str(raised.value) or "'sum'" in str(raised.value) or "'1'" in str(raised.value)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_fisher_that_needs_a_loss_says_so(fisher: str) -> None:
    with pytest.raises(ValueError, match=rf'`fisher="{fisher}"` needs to know the loss: pass `loss="cross_entropy"`'):
        natgrad.Preconditioner(stack([3, 4, 2]), fisher=fisher)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.PReLU(3), "it knows .*Linear.*weight: no layer kind is registered for PReLU"),
        (nn.Tanh(), "It has no parameters"),
        (nn.Linear(3, 2).requires_grad_(False), r"weight: frozen \(requires_grad=False\)"),
    ],
)
def test_a_model_without_a_supported_layer_is_refused(model: nn.Module, text: str) -> None:
    with pytest.raises(ValueError, match=rf"the model has no layer that natgrad can precondition.*{text}"):
        natgrad.Preconditioner(model, "mse")


@pytest.mark.parametrize("kind", [natgrad.Preconditioner, natgrad.KFAC])
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: stack([3, 4, 2]).parameters(), "must be the model itself.*not a generator.*pass them as `params=`"),
        (lambda: list(stack([3, 4, 2]).parameters()), "must be the model itself.*not a list"),
        (torch.jit.ScriptModule, "was scripted or traced.*the module that it was made from"),
    ],
    ids=["parameters", "list", "scripted"],
)
def test_what_is_no_model_or_hides_its_layers_is_refused(kind: Any, make: Callable[[], Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        kind(make(), loss="mse")


def test_a_layer_that_does_not_know_its_sizes_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LazyLinear(4))
    with pytest.raises(ValueError, match="layer '1' does not know its sizes yet: send a batch through the model"):
        natgrad.Preconditioner(model, "mse")
    model(torch.randn(2, 3))
    assert len(natgrad.Preconditioner(model, "mse").layers) == 2
