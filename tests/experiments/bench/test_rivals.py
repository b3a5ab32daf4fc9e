"""Every contestant takes every setting of its space, and trains what it should."""

import sys

import pytest
import torch
from test_workloads import TINY

from natgrad.experiments.bench import contestants
from natgrad.experiments.bench.contestants import CONTESTANTS, find
from natgrad.experiments.bench.spaces import Choice, Log, trials
from natgrad.experiments.bench.trial import Trial
from natgrad.experiments.bench.workload import Workload
from natgrad.experiments.settings import SettingsError

PACKAGES = {"soap": "pytorch_optimizer", "shampoo": "pytorch_optimizer", "singd": "singd"}


def start(name: str, workload: Workload, settings: dict[str, object] | None = None) -> Trial:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return Trial(find(name), settings or {}, workload, seed=1, seconds=float("inf"))


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_setting_of_the_space_is_understood(name: str) -> None:
    space = CONTESTANTS[name].space
    ends = [{key: kind.at(u) for key, kind in space.items()} for u in (0.0, 0.5, 1.0)]
    for settings in [*ends, *trials(space, 4)]:
        trial = start(name, TINY["mlp"](), settings)
        trial.step()
        assert not trial.outcome.failure, settings


@pytest.mark.parametrize("workload", ["convnet", "gpt", "article, weight norm"])
@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_parameter_is_trained(name: str, workload: str) -> None:
    """Or the contestant says that it cannot, as SINGD of weight normalization."""
    trial = start(name, TINY[workload]())
    if (name, workload) == ("singd", "article, weight norm"):
        assert trial.outcome.failure.startswith("does not apply")
        return
    before = {n: p.detach().clone() for n, p in trial.model.named_parameters()}
    for _ in range(3):
        trial.step()
    assert not trial.outcome.failure
    assert [n for n, p in trial.model.named_parameters() if torch.equal(p, before[n])] == []


@pytest.mark.parametrize(("workload", "ends", "expected"), [
    ("convnet", "adamw", ["4.weight", "8.weight"]),
    ("convnet", "muon", ["0.weight", "4.weight", "8.weight", "13.weight"]),
    ("mlp", "adamw", ["2.weight"]),
    ("gpt", "adamw", [f"blocks.0.{n}.weight" for n in ("qkv", "project", "mlp.0", "mlp.2")]),
])  # fmt: skip
def test_muon_gets_the_layers_in_between(workload: str, ends: str, expected: list[str]) -> None:
    trial = start("muon", TINY[workload](), {"ends": ends})
    names = {p.data_ptr(): n for n, p in trial.model.named_parameters()}
    muon, *rest = trial.optimizers
    assert [names[p.data_ptr()] for p in muon.param_groups[0]["params"]] == expected
    others = [names[p.data_ptr()] for o in rest for g in o.param_groups for p in g["params"]]
    assert sorted([*expected, *others]) == sorted(names.values())


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_muon_orthogonalizes(shape: tuple[int, int]) -> None:
    """The same singular vectors, with singular values that the iteration brings near one."""
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    found = u.T @ contestants._newton_schulz(update, (3.4445, -4.7750, 2.0315), 5, 1e-7) @ vh.T
    assert torch.allclose(found, torch.diag(found.diagonal()), atol=1e-10)
    large = found.diagonal()[s > 0.1 * s.max()]
    assert large.min() > 0.6
    assert large.max() < 1.3


def test_defaults_are_the_packages_own() -> None:
    adamw, *_ = start("adamw", TINY["mlp"]()).optimizers
    ours, theirs = adamw.param_groups[0], torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
    different = {key for key in theirs if key != "params" and ours[key] != theirs[key]}
    assert different == {"fused"}


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(SettingsError, match=r"needs pytorch_optimizer: pip install 'natgrad\[benchmarks\]'"):
        Trial(find("soap"), {}, TINY["linear"](), seed=1, seconds=1.0)


def test_an_unknown_contestant_names_the_choices() -> None:
    with pytest.raises(SettingsError, match="unknown contestant 'adam': choose from sgd, adamw, "):
        find("adam")


# Spaces.


def test_trials_start_with_the_defaults_and_continue_each_other() -> None:
    space = {"lr": Log(1e-3, 1e1), "beta": Choice("a", "b")}
    longer, shorter = trials(space, 16), trials(space, 5)
    assert longer[:5] == shorter
    assert longer[0] == {}
    assert trials(space, 1) == [{}]
    rates = [t["lr"] for t in longer[1:]]
    assert all(1e-3 <= rate <= 1e1 for rate in rates)
    # Of each decade a fair share, which a mistake in the logarithm would not give.
    assert min(sum(low <= rate < 10 * low for rate in rates) for low in (1e-3, 1e-2, 1e-1, 1.0)) >= 3
    assert {t["beta"] for t in longer[1:]} == {"a", "b"}
    assert {t["decay"] for t in longer[1:]} == {False, True}


def test_the_ends_of_a_range() -> None:
    assert (Log(1e-3, 10.0).at(0.0), Log(1e-3, 10.0).at(1.0), Log(1e-2, 1.0).at(0.5)) == (1e-3, 10.0, 0.1)
    assert [Choice(1, 2, 3).at(u) for u in (0.0, 0.4, 0.99, 1.0)] == [1, 2, 3, 3]
