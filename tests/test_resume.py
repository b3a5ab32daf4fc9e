"""A run that is interrupted and resumed is bitwise the run that was not, whatever tool wrote the checkpoint."""

import copy
import io
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as tools

import natgrad
from kfac_cases import assert_same, every_mode, network, train, values
from natgrad import checkpoint, metric
from natgrad.inverses import INVERSES

pytestmark = pytest.mark.usefixtures("float64")

MODES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "minibatches": {"batch_fraction": 0.5, "factor_decay": "auto"},
    "periods": {"curvature_period": 2, "inverse_period": 3},
    "inverses that wait": {"curvature_period": 4, "inverse_period": 1},
    "ekfac": {"inverse": "ekfac"},
    "ekfac, periods": {"inverse": "ekfac", "inverse_period": 3, "factor_decay": 0.9},
    "numbers": {"lr": 0.1, "momentum": 0.9, "damping": 0.1},
    "no momentum": {"lr": 0.1, "momentum": 0.0, "inverse": "eigen"},
}
every_setting = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
Write = Callable[[natgrad.KFAC, natgrad.KFAC, pathlib.Path], None]


def by_file(old: natgrad.KFAC, new: natgrad.KFAC, path: pathlib.Path) -> None:
    state = {"model": old.preconditioner.model.state_dict(), "optimizer": old.state_dict()}
    checkpoint.save(state, path / "state.pt")
    read = torch.load(path / "state.pt", weights_only=True)
    new.preconditioner.model.load_state_dict(read["model"])
    new.load_state_dict(read["optimizer"])


def by_torch_tools(old: natgrad.KFAC, new: natgrad.KFAC, path: pathlib.Path, **options: bool) -> None:
    """As torch's guide to distributed checkpoints has it; one process needs no group."""
    wanted = tools.StateDictOptions(**options)
    model, optimizer = tools.get_state_dict(old.preconditioner.model, old, options=wanted)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=path / "dcp", no_dist=True)
    model, optimizer = tools.get_state_dict(new.preconditioner.model, new, options=wanted)
    read = {"model": model, "optimizer": optimizer}
    dcp.load(read, checkpoint_id=path / "dcp", no_dist=True)
    tools.set_state_dict(
        new.preconditioner.model,
        new,
        model_state_dict=read["model"],
        optim_state_dict=read["optimizer"],
        options=wanted,
    )


def by_flat_names(old: natgrad.KFAC, new: natgrad.KFAC, path: pathlib.Path) -> None:
    by_torch_tools(old, new, path, flatten_optimizer_state_dict=True)


every_tool = pytest.mark.parametrize("through", [by_file, by_torch_tools, by_flat_names])


@pytest.mark.filterwarnings("ignore:.*TypedStorage", "ignore:torch.distributed is", "ignore:.*no_dist")
@every_tool
@every_setting
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_kfac_goes_on_bitwise(through: Write, mode: dict[str, Any], steps: int, tmp_path: pathlib.Path) -> None:
    whole, resumed = (natgrad.KFAC(network(), "mse", weight_decay=0.1, **mode) for _ in range(2))
    train(whole, *range(steps))
    through(whole, resumed, tmp_path)
    if steps:
        assert_same(values(resumed), values(whole))
    for seed in range(steps, steps + 5):
        train(whole, seed)
        train(resumed, seed)
        assert_same(values(resumed), values(whole))


@pytest.mark.filterwarnings("ignore:.*TypedStorage", "ignore:torch.distributed is", "ignore:.*no_dist")
@pytest.mark.parametrize(
    "mode", [m for m in MODES.values() if "lr" not in m], ids=[k for k, m in MODES.items() if "lr" not in m]
)
@pytest.mark.parametrize("tool", ["file", "dcp"])
@pytest.mark.parametrize("steps", [1, 7])
def test_the_preconditioner_goes_on_bitwise(
    mode: dict[str, Any], tool: str, steps: int, tmp_path: pathlib.Path
) -> None:
    runs = []
    for _ in range(2):
        model = network()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        runs.append({"model": model, "sgd": sgd, "preconditioner": natgrad.Preconditioner(model, "mse", **mode)})
    whole, resumed = runs
    for seed in range(steps):
        one_step(whole, seed)
    state = {name: part.state_dict() for name, part in whole.items()}
    if tool == "file":
        checkpoint.save(state, tmp_path / "state.pt")
        state = checkpoint.load(tmp_path / "state.pt")
    else:
        del state["sgd"]  # whose state is not there up front without torch's tools
        dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
        state = {name: resumed[name].state_dict() for name in state}
        dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
        state["sgd"] = copy.deepcopy(whole["sgd"].state_dict())
    for name, part in state.items():
        resumed[name].load_state_dict(part)
    for seed in range(steps, steps + 5):
        assert_same(kept(resumed), kept(whole))
        one_step(whole, seed)
        one_step(resumed, seed)
    assert_same(kept(resumed), kept(whole))


def one_step(run: dict[str, Any], seed: int) -> None:
    from kfac_cases import backward

    backward(run["model"], seed)
    assert run["preconditioner"].step()
    run["sgd"].step()


def kept(run: dict[str, Any]) -> dict[str, Tensor]:
    states = run["preconditioner"].states()
    named = {f"{name}.{key}": t for name, state in states.items() for key, t in state.items()}
    named |= {n: p.detach() for n, p in run["model"].named_parameters()}
    return {name: t.clone() for name, t in named.items()}


class Skipping(nn.Module):
    """The second layer is used at even calls only, so that its inverse is older than the first's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return h if self.skip else h + self.second(h)


def train_skipping(optimizer: natgrad.KFAC, step: int) -> None:
    optimizer.preconditioner.model.skip = step % 2 == 1
    train(optimizer, step)


@pytest.mark.parametrize("inverse", ["cholesky", "ekfac"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_inverse_that_was_kept_is_kept(inverse: str, steps: int, tmp_path: pathlib.Path) -> None:
    """Its factors have not moved, but the damping of the whole network has: computed anew it would be another one."""
    options: dict[str, Any] = {
        "lr": 0.1,
        "momentum": 0.9,
        "inverse": inverse,
        "curvature_period": 1,
        "inverse_period": 1,
    }
    whole, resumed = (natgrad.KFAC(Skipping(), "mse", **options) for _ in range(2))
    for step in range(steps):
        train_skipping(whole, step)
    by_file(whole, resumed, tmp_path)
    for step in range(steps, steps + 3):
        train_skipping(whole, step)
        train_skipping(resumed, step)
        assert_same(values(resumed), values(whole))


def shapes(optimizer: natgrad.KFAC) -> dict[Any, Any]:
    state = optimizer.state_dict()["state"]
    return {i: {k: (tuple(t.shape), t.dtype) for k, t in kept.items()} for i, kept in state.items()}


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_state_is_complete_before_the_first_step(mode: dict[str, Any], dtype: torch.dtype) -> None:
    """Catches a tensor that only training creates, or creates of another shape or dtype than a checkpoint expects."""
    optimizer = natgrad.KFAC(network(dtype), "mse", **mode)
    before = shapes(optimizer)
    train(optimizer, *range(4))
    assert shapes(optimizer) == before


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
        nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Flatten(), nn.Linear(6, 2)),
    ],
)
def test_so_it_is_for_blocks_and_diagonals(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natgrad.layers.base.MAX_DENSE", 10)
    for inverse in ("cholesky", "eigen", "ekfac"):
        optimizer = natgrad.KFAC(model.double(), "mse", inverse=inverse)
        before = shapes(optimizer)
        for seed in range(2):
            torch.manual_seed(seed)
            x = torch.randint(5, (6, 2)) if isinstance(model[0], nn.Embedding) else torch.randn(6, 2, 4, 4)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), torch.randn(6, 2)).backward()
            optimizer.step()
        assert shapes(optimizer) == before


@every_mode
def test_torch_tools_change_nothing(mode: dict[str, Any]) -> None:
    """They step a fresh optimizer with zero gradients and rate zero; a forward pass may have been before."""
    plain, primed = (natgrad.KFAC(network(), "mse", weight_decay=0.1, **mode) for _ in range(2))
    primed.preconditioner.model(torch.ones(6, 3))
    for steps in (0, 2):
        before = {n: p.detach().clone() for n, p in primed.preconditioner.model.named_parameters()}
        state = tools.get_optimizer_state_dict(primed.preconditioner.model, primed)
        assert state["state"].keys() == before.keys()
        tools.set_optimizer_state_dict(primed.preconditioner.model, primed, state)
        after = values(primed)
        assert_same({name: after[name] for name in before}, before)
        assert [g["lr"] for g in primed.param_groups] == [g["lr"] for g in plain.param_groups]
        train(plain, steps, steps + 1)
        train(primed, steps, steps + 1)
        assert_same(values(primed), values(plain))


def test_state_hooks_see_and_change_what_is_saved_and_loaded() -> None:
    old, new = (natgrad.KFAC(network(), "mse", lr=0.1, momentum=0.9) for _ in range(2))
    train(old, 0)
    seen: list[Any] = []
    old.register_state_dict_pre_hook(lambda optimizer: seen.append("before"))
    old.register_state_dict_post_hook(lambda optimizer, state: {**state, "tag": len(state["state"])})
    saved = old.state_dict()
    assert seen == ["before"]
    assert saved.pop("tag") == 5

    def double(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        velocity = {**state["state"][0], "velocity": 2 * state["state"][0]["velocity"]}
        return {**state, "state": {**state["state"], 0: velocity}}

    new.register_load_state_dict_pre_hook(double)
    new.register_load_state_dict_post_hook(lambda optimizer: seen.append(values(optimizer)["0.weight.velocity"]))
    new.load_state_dict(saved)
    assert torch.equal(seen[1], 2 * values(old)["0.weight.velocity"])


def test_the_state_of_another_version_is_refused_and_named() -> None:
    """Numbers in another order would be taken for what they are not."""
    optimizer, new = natgrad.KFAC(network(), "mse"), natgrad.KFAC(network(), "mse")
    train(optimizer, 0)
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "ease": torch.ones(4)}
    with pytest.raises(ValueError, match="another version of natgrad: 'ease' of layer '0' holds 4 numbers, not 6"):
        new.load_state_dict(saved)
    assert new.preconditioner.steps == 0


@pytest.mark.parametrize("mode", [{}, {"inverse": "ekfac"}, {"lr": 0.1, "momentum": 0.9}], ids=str)
def test_a_run_goes_on_in_another_precision(mode: dict[str, Any]) -> None:
    """Catches factors of one precision beside gradients of another."""
    first = natgrad.KFAC(network(), "mse", **mode)
    train(first, 0, 1, 2)
    single = copy.deepcopy(first.preconditioner.model).float()
    second = natgrad.KFAC(single, "mse", **mode)
    second.load_state_dict(first.state_dict())
    train(first, 3, 4)
    train(second, 3, 4)
    for one, same in zip(single.parameters(), first.preconditioner.model.parameters(), strict=True):
        torch.testing.assert_close(one.double(), same, rtol=0.02, atol=1e-3)


def test_files_are_read_without_trust() -> None:
    optimizer = natgrad.KFAC(network(), "mse")
    train(optimizer, 0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["param_names"] == [
        "0.weight",
        "0.bias",
        "3.weight",
        "3.bias",
    ]


@pytest.mark.parametrize(("old", "new"), [("ekfac", "cholesky"), ("eigen", "ekfac"), ("cholesky", "eigen")])
def test_an_inverse_of_another_kind_is_not_kept(old: str, new: str) -> None:
    """It would stay in every later checkpoint, and tell of a condition that is no longer there."""
    first = natgrad.KFAC(network(), "mse", inverse=old)
    train(first, 0, 1, 2)
    second = natgrad.KFAC(copy.deepcopy(first.preconditioner.model), "mse", inverse=new)
    second.load_state_dict(first.state_dict())
    train(second, 3, 4, 5)
    kept = {name for state in second.preconditioner.states().values() for name in state} & metric.OF_ANY
    assert kept == set(INVERSES[new].names)


@pytest.mark.parametrize("automatic", [False, True])
def test_a_rate_that_meant_something_else_is_not_loaded(automatic: bool) -> None:
    """A factor of one would become a rate of one, and the loss explode."""
    modes: list[dict[str, Any]] = [{}, {"lr": 0.1, "momentum": 0.9}]
    first, second = (natgrad.KFAC(network(), "mse", **mode) for mode in modes[:: -1 if automatic else 1])
    train(first, 0, 1)
    before = values(second)
    with pytest.raises(ValueError, match="construct it with `lr=" + ("0.1`" if automatic else "'auto'`")):
        second.load_state_dict(first.state_dict())
    assert_same(values(second), before)


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="saved by another optimizer"):
        natgrad.KFAC(network(), "mse").load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


@pytest.mark.parametrize("chosen", ["frozen", "left out"])
def test_a_model_of_which_some_is_trained_can_be_saved(chosen: str) -> None:
    """A look for the previous step of what is not trained must not leave a state of it."""
    model = network()
    if chosen == "frozen":
        model[0].requires_grad_(False)
    params = None if chosen == "frozen" else list(model[3].parameters())
    optimizer = natgrad.KFAC(model, "mse", params=params)
    train(optimizer, 0, 1, 2)
    saved = optimizer.state_dict()
    assert saved["state"].keys() == {index for group in saved["param_groups"] for index in group["params"]}
    optimizer.load_state_dict(saved)
    train(optimizer, 3)
