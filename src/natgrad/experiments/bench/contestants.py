"""The contestants: each is one function from a model, a workload and settings to the optimizers that train it.

To add one, decorate the function with `@contestant(name, label, space)`; keyword arguments are its settings, their
defaults what the *defaults-only* track uses: those of the package, and where it has none, those of its documentation.
All optimizers that a function returns take their step together. Rivals' packages are imported where they are used.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import natgrad
from natgrad.experiments.bench.spaces import Choice, Log, Space
from natgrad.experiments.bench.workload import Workload
from natgrad.experiments.settings import SettingsError


class NotApplicableError(Exception):
    """This contestant cannot train this model; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """A row of the registry.

    Attributes:
        name: In records and on the command line.
        label: In tables and plots.
        space: From which its settings are drawn when it is tuned, the same for all workloads.
        build: From a model, the workload and settings to optimizers.
    """

    name: str
    label: str
    space: Space
    build: Callable[..., list[Optimizer]]


CONTESTANTS: dict[str, Contestant] = {}


def contestant(
    name: str, label: str, space: Space
) -> Callable[[Callable[..., list[Optimizer]]], Callable[..., list[Optimizer]]]:
    """Register a function that builds optimizers."""

    def register(build: Callable[..., list[Optimizer]]) -> Callable[..., list[Optimizer]]:
        CONTESTANTS[name] = Contestant(name, label, space, build)
        return build

    return register


def find(name: str) -> Contestant:
    """The contestant of a name.

    Raises:
        SettingsError: There is none.
    """
    if name not in CONTESTANTS:
        raise SettingsError(f"unknown contestant {name!r}: choose from {', '.join(CONTESTANTS)}")
    return CONTESTANTS[name]


@contestant("sgd", "SGD", {"lr": Log(1e-3, 3.0), "momentum": Choice(0.9, 0.95, 0.99), "nesterov": Choice(False, True)})
def _sgd(model: nn.Module, workload: Workload, **settings: Any) -> list[Optimizer]:
    """torch's default rate, and the momentum that everybody uses."""
    return [torch.optim.SGD(model.parameters(), **{"lr": 1e-3, "momentum": 0.9, **settings})]


@contestant(
    "adamw",
    "AdamW",
    {"lr": Log(1e-4, 3e-2), "beta1": Choice(0.9, 0.95, 0.8), "weight_decay": Choice(1e-2, 0.0, 1e-1)},
)
def _adamw(model: nn.Module, workload: Workload, beta1: float = 0.9, **settings: Any) -> list[Optimizer]:
    """torch's fused one, with its defaults."""
    return [torch.optim.AdamW(model.parameters(), betas=(beta1, 0.999), fused=True, **settings)]


@contestant(
    "muon",
    "Muon",
    {
        "lr": Log(1e-3, 0.5),
        "momentum": Choice(0.95, 0.9, 0.98),
        "adamw_lr": Log(3e-4, 1e-2),
        "ends": Choice("adamw", "muon"),
        "weight_decay": Choice(0.1, 0.0),
    },
)
def _muon(
    model: nn.Module, workload: Workload, adamw_lr: float = 1e-3, ends: str = "adamw", **settings: Any
) -> list[Optimizer]:
    """torch's, on weight matrices and on kernels flattened to matrices; AdamW for embeddings, biases and norms.

    As Muon's author advises, AdamW also trains the first and the last layer; as that is a loss on some workloads,
    tuning may give them to Muon (``ends``).
    """
    kernels = [p for name, p in model.named_parameters() if p.ndim > 1 and name.endswith(("weight", "original1"))]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    kernels = [p for p in kernels if id(p) not in embeddings]
    first = 0 if embeddings else 1  # An embedding is the first layer already.
    inner = kernels if ends == "muon" else kernels[first:-1]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(inner, **settings), *([torch.optim.AdamW(rest, lr=adamw_lr, fused=True)] if rest else [])]


class Muon(torch.optim.Muon):
    """torch's, which takes matrices only, for kernels of any shape: it works on views of them as (out, the rest)."""

    def __init__(self, kernels: list[nn.Parameter], **settings: Any) -> None:
        _orthogonalize_fast()
        self._kernels = kernels
        self._views = [nn.Parameter(kernel.detach().view(len(kernel), -1)) for kernel in kernels]
        super().__init__(self._views, **settings)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the kernels."""
        for kernel in self._kernels:
            kernel.grad = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """With the kernels' gradients."""
        for kernel, view in zip(self._kernels, self._views, strict=True):
            view.grad = None if kernel.grad is None else kernel.grad.view_as(view)
        super().step()  # type: ignore[no-untyped-call]


def _orthogonalize_fast() -> None:
    """Let torch's Muon orthogonalize in float32 where the processor only emulates bfloat16, at 1/20 of the speed."""
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        setattr(importlib.import_module("torch.optim._muon"), "_zeropower_via_newtonschulz", _newton_schulz)  # noqa: B010


def _newton_schulz(update: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Muon's polynomial X ← aX + (bS + cS²)X with S = XXᵀ, in the precision of its argument."""
    a, b, c = coefficients
    is_tall = update.shape[0] > update.shape[1]
    X: Tensor = update.T if is_tall else update
    X = X / X.norm().clamp(min=eps)
    for _ in range(steps):
        S = X @ X.T
        X = a * X + (b * S + c * S @ S) @ X
    return X.T if is_tall else X


@contestant(
    "soap",
    "SOAP",
    {
        "lr": Log(3e-4, 3e-2),
        "precondition_frequency": Choice(10, 2, 5),
        "beta": Choice(0.95, 0.9, 0.99),
        "weight_decay": Choice(1e-2, 0.0),
    },
)
def _soap(model: nn.Module, workload: Workload, beta: float = 0.95, **settings: Any) -> list[Optimizer]:
    """pytorch_optimizer's, which follows the authors' step by step and has their defaults."""
    package = rival("pytorch_optimizer")
    return [package.SOAP(model.parameters(), betas=(beta, beta), **settings)]


@contestant(
    "shampoo",
    "Shampoo",
    {
        "lr": Log(1e-4, 3e-2),
        "period": Choice(10, 2, 5),
        "beta2": Choice(0.999, 0.95, 0.99),
        "matrix_eps": Choice(1e-6, 1e-9, 1e-4),
    },
)
def _shampoo(
    model: nn.Module, workload: Workload, period: int = 10, beta2: float = 0.999, **settings: Any
) -> list[Optimizer]:
    """pytorch_optimizer's port of Google's distributed Shampoo, its layers' step sizes grafted from RMSProp.

    The package computes preconditioners every 1,000 steps, which suits runs longer than these: here every 10, and they
    are used from the first that there is. Blocks of 1,024, so that the layers of all workloads stay whole.
    """
    package = rival("pytorch_optimizer")
    grafting = importlib.import_module("pytorch_optimizer.optimizer.shampoo").LayerWiseGrafting
    return [
        package.ScalableShampoo(
            model.parameters(),
            betas=(0.9, beta2),
            preconditioning_compute_steps=period,
            start_preconditioning_step=period,
            moving_average_for_momentum=True,
            block_size=1024,
            graft_type=grafting.RMSPROP,
            **settings,
        )
    ]


@contestant(
    "singd",
    "SINGD",
    {
        "lr": Log(1e-4, 1e-1),
        "damping": Log(1e-5, 1e-1),
        "lr_cov": Log(1e-3, 1e-1),
        "T": Choice(10, 1, 3),
    },
)
def _singd(model: nn.Module, workload: Workload, **settings: Any) -> list[Optimizer]:
    """The authors' package, dense structures; AdamW with its defaults for what is neither linear nor a convolution."""
    supported = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if any(not isinstance(m.weight, nn.Parameter) for m in supported):
        raise NotApplicableError("SINGD does not know parametrized weights")
    singd = rival("singd.optim.optimizer").SINGD(
        model,
        loss_average="batch+sequence" if workload.sequence else "batch",
        warn_unsupported=False,
        **settings,
    )
    chosen = {id(p) for m in supported for p in m.parameters(recurse=False)}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [singd, torch.optim.AdamW(rest, fused=True)] if rest else [singd]


@contestant(
    "kfac",
    "natgrad.KFAC",
    {
        "lr": Choice("auto", 0.1),
        "damping": Choice("auto", 1e-5),
        "weight_decay": Choice(0.0, 1e-3, 1e-2),
    },
)
def _kfac(model: nn.Module, workload: Workload, lr: float | str = "auto", **settings: Any) -> list[Optimizer]:
    """natgrad with nothing set; with a number as ``lr``, as the documentation advises for given rates."""
    rates: Any = {} if lr == "auto" else {"lr": lr, "momentum": 0.9, "kl_clip": 1e-3}
    return [natgrad.KFAC(model, workload.natgrad_loss, **rates, **settings)]


def rival(module: str) -> Any:
    """Import a rival's module.

    Raises:
        SettingsError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"this contestant needs {module.partition('.')[0]}: pip install 'natgrad[benchmarks]', or leave it out of "
            "--contestants"
        ) from error
