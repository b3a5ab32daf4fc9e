"""The report that compares a network's blocks with the exact ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import natgrad
from natgrad.cli import app
from oracle import ggn_block, kfac_block, layer_params, relative_error

pytestmark = pytest.mark.usefixtures("float64")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3))


def data(n: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 1, 4, 4), torch.randint(3, (n,))


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(label_smoothing=0.2, weight=torch.tensor([1.0, 2.0, 0.5]).double())]
)
def test_errors_are_those_against_the_oracle(loss: nn.Module) -> None:
    """The truth is computed a second time in the product: both must agree."""
    model, (x, y) = network(), data()
    expected = {}
    for name in ("0", "3", "5"):
        exact = ggn_block(model, layer_params(model, name), x, y, loss)
        expected[name] = relative_error(kfac_block(model, name, x, y, loss), exact)
    report = natgrad.verify(model, x, y, loss)
    assert {layer.name: layer.kfac for layer in report.layers} == pytest.approx(expected, rel=1e-8)
    assert all(layer.ekfac <= layer.kfac for layer in report.layers)
    assert report.notes == []


def test_what_is_exact_is_called_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    report = natgrad.verify(model, torch.randn(8, 5), torch.randn(8, 3), "mse")
    last = report.layers[-1]
    assert last.verdict == "exact"
    assert last.cosine == pytest.approx(1.0)
    assert [
        layer.verdict for layer in natgrad.verify(model[:2], torch.randn(8, 5), torch.randn(8, 3), "mse").layers
    ] == [
        "exact",
        "exact",
    ]


def test_large_layers_are_sampled_and_near_the_truth() -> None:
    model, (x, y) = network(), data()
    dense = {layer.name: layer.kfac for layer in natgrad.verify(model, x, y, "cross_entropy").layers}
    sampled = natgrad.verify(model, x, y, "cross_entropy", max_parameters=20)
    assert [layer.sampled for layer in sampled.layers] == [True, True, False]
    for layer in sampled.layers:
        assert layer.kfac == pytest.approx(dense[layer.name], rel=0.4)
    assert sampled.notes == ["* of a layer with more than 20 parameters: from 16 random products."]


def test_large_batches_are_cut_and_the_report_says_so() -> None:
    model, (x, y) = network(), data(10)
    report = natgrad.verify(model, x, y, "cross_entropy", max_outputs=12)
    assert report.notes == ["The first 4 of 10 data were used, as all of them have 30 output entries."]
    alone = natgrad.verify(model, x[:4], y[:4], "cross_entropy")
    assert [layer.kfac for layer in report.layers] == [layer.kfac for layer in alone.layers]


class ByName(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.inner(batch["x"] * batch["scale"].mean())


def test_inputs_in_a_dictionary_are_cut_as_well() -> None:
    model, (x, y) = network(), data(10)
    one = {"scale": torch.ones(4), "x": x}
    report = natgrad.verify(ByName(model), one, y, "cross_entropy", max_outputs=12)
    alone = natgrad.verify(model, x[:4], y[:4], "cross_entropy")
    assert [layer.kfac for layer in report.layers] == [layer.kfac for layer in alone.layers]


@pytest.mark.parametrize("look", [natgrad.verify, natgrad.curvature])
def test_what_is_no_module_is_refused(look: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="must be the model itself"):
        look(list(network().parameters()), *data(10), "cross_entropy")


def test_recurrent_layers_have_no_forward_mode_and_are_verified_all_the_same() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lstm, self.head = nn.Embedding(9, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(self.embed(x))[0]).transpose(1, 2)

    torch.manual_seed(0)
    tokens = torch.randint(9, (3, 4))
    report = natgrad.verify(Language().float(), tokens, tokens, "cross_entropy", max_parameters=100)
    assert [layer.name for layer in report.layers] == ["embed", "lstm.ih_l0", "lstm.hh_l0", "head"]
    assert all(0 <= layer.ekfac <= 1.5 for layer in report.layers)


def test_command_line(tmp_path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\ndef problem():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Linear(3, 2).double(), torch.randn(5, 3).double(), torch.randn(5, 2).double(), 'mse'\n"
    )
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["verify", "mine:problem"])
    assert result.exit_code == 0
    assert "exact" in result.output
    result = CliRunner().invoke(app, ["verify", "mine:other"])
    assert result.exit_code == 2
    assert "give module:function" in result.output
