"""The optimizers of the experiment: a registry, and one optimizer at work on its own copy of the network.

A row of the registry is one small function from (model, settings) to a `Method`; add one with `@contestant(name,
label)`. SGD and Adam have the article's learning rates. ``kfac-sgd`` and ``kfac-adam`` are the article's K-FAC of 2017
in front of them: fresh curvature from one Gaussian sample per image, both factors damped by 3e-3, inverted at every
step. ``kfac`` is natgrad as a user gets it, with no setting at all.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import natgrad
from natgrad.experiments import spectra
from natgrad.experiments.autoencoder import Problem, half_squared_error, network
from natgrad.experiments.samples import LAYERS_PER_DOUBLING, PICTURES_PER_DOUBLING, is_sampled
from natgrad.experiments.settings import Settings, SettingsError


@dataclass
class Method:
    """An optimizer, and the preconditioner in front of it if there is one."""

    optimizer: torch.optim.Optimizer
    preconditioner: natgrad.Preconditioner | None = None

    def diagnostics(self, per_layer: bool) -> dict[str, float]:
        """The scalars that the K-FAC part reports about its last step (empty for a plain torch optimizer)."""
        if self.preconditioner is not None:
            return self.preconditioner.diagnostics(per_layer)
        if isinstance(self.optimizer, natgrad.KFAC):
            return self.optimizer.diagnostics(per_layer)
        return {}

    def spectra(self) -> dict[str, float]:
        """Quantiles of the eigenvalues of the K-FAC part's factors."""
        optimizer = self.optimizer
        owner = optimizer.preconditioner if isinstance(optimizer, natgrad.KFAC) else self.preconditioner
        return {} if owner is None else spectra.told(owner.factors())


Builder = Callable[[nn.Module, Settings], Method]
CONTESTANTS: dict[str, Builder] = {}
LABELS: dict[str, str] = {}


def contestant(name: str, label: str) -> Callable[[Builder], Builder]:
    """Register a function that builds a `Method` under ``name``, shown as ``label`` in tables and plots."""

    def register(build: Builder) -> Builder:
        CONTESTANTS[name], LABELS[name] = build, label
        return build

    return register


def _by_nonlinearity(settings: Settings, sigmoid: float) -> float:
    # The article's ReLU variant divides both learning rates by 10.
    return sigmoid if settings.nonlinearity == "sigmoid" else sigmoid / 10


@contestant("sgd", "SGD")
def _sgd(model: nn.Module, settings: Settings) -> Method:
    return Method(torch.optim.SGD(model.parameters(), lr=_by_nonlinearity(settings, 0.2)))


@contestant("adam", "Adam")
def _adam(model: nn.Module, settings: Settings) -> Method:
    return Method(torch.optim.Adam(model.parameters(), lr=_by_nonlinearity(settings, 1e-3)))


@contestant("kfac-sgd", "K-FAC 2017 + SGD")
def _kfac_sgd(model: nn.Module, settings: Settings) -> Method:
    return Method(_sgd(model, settings).optimizer, _kfac_2017(model))


@contestant("kfac-adam", "K-FAC 2017 + Adam")
def _kfac_adam(model: nn.Module, settings: Settings) -> Method:
    return Method(_adam(model, settings).optimizer, _kfac_2017(model))


@contestant("kfac", "natgrad.KFAC")
def _kfac(model: nn.Module, settings: Settings) -> Method:
    return Method(natgrad.KFAC(model, loss=natgrad.likelihoods.Gaussian(reduction="batchmean")))


def _kfac_2017(model: nn.Module) -> natgrad.Preconditioner:
    return natgrad.Preconditioner(
        model,
        loss=natgrad.likelihoods.Gaussian(reduction="batchmean"),
        fisher="mc",
        damping=(3e-3, 3e-3),
        inverse="cholesky",
        factor_decay=0.0,
        curvature_period=1,
        inverse_period=1,
        batch_fraction=1.0,
    )


@dataclass(frozen=True)
class Record:
    """What is known about a contestant at one step: the losses of the parameters *before* it, as in the 2017 records.

    Attributes:
        optimizer: The contestant's name.
        step: Number of steps taken before (0-based).
        train_loss: Loss of this step's forward pass; None if it was not finite.
        test_loss: Loss on the test images; None if it was not measured at this step, or not finite.
        seconds: Training seconds used before this step.
        diagnostics: What the optimizer reported after the step; of each layer at some of the steps only.
    """

    optimizer: str
    step: int
    train_loss: float | None
    test_loss: float | None
    seconds: float
    diagnostics: dict[str, float | None] = field(default_factory=dict)


class Contestant:
    """One optimizer on its own copy of the network, with its own clock.

    Attributes:
        name: Its name in the registry.
        step: Steps taken.
        seconds: Training time used: forward, backward and update. Evaluation is not training.
        diverged: Whether its training loss stopped being finite; it then takes no further step.
    """

    def __init__(self, name: str, problem: Problem) -> None:
        if name not in CONTESTANTS:
            raise SettingsError(f"unknown optimizer {name!r}: choose from {', '.join(CONTESTANTS)}")
        self.name = name
        self.step = 0
        self.seconds = 0.0
        self.diverged = False
        self._problem = problem
        self._model = network(problem.settings)
        self._method = CONTESTANTS[name](self._model, problem.settings)

    def advance(self) -> Record:
        """Evaluate if due, then take one step with the clock running."""
        step, seconds = self.step, self.seconds
        due = step % self._problem.settings.evaluation_interval == 0
        test_loss = self._problem.test_loss(self._model) if due else None
        train_loss = self._train(self._problem.batch(step))
        self.step += 1
        self.diverged = not math.isfinite(train_loss)
        told = self._method.diagnostics(per_layer=is_sampled(step, LAYERS_PER_DOUBLING))
        if is_sampled(step, PICTURES_PER_DOUBLING):
            told |= self._method.spectra()
        diagnostics = {key: _finite(value) for key, value in told.items()}
        return Record(self.name, step, _finite(train_loss), _finite(test_loss), seconds, diagnostics)

    def reconstructions(self) -> torch.Tensor:
        """What the network makes of `Problem.digits` now: (10, 784)."""
        with torch.no_grad():
            made: torch.Tensor = self._model(self._problem.digits)
        return made

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: tensors and plain values, so that `torch.load(weights_only=True)` reads it."""
        preconditioner = self._method.preconditioner
        return {
            "model": self._model.state_dict(),
            "optimizer": self._method.optimizer.state_dict(),
            "preconditioner": None if preconditioner is None else preconditioner.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "diverged": self.diverged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._model.load_state_dict(state["model"])
        self._method.optimizer.load_state_dict(state["optimizer"])
        if self._method.preconditioner is not None:
            self._method.preconditioner.load_state_dict(state["preconditioner"])
        self.step, self.seconds, self.diverged = state["step"], state["seconds"], state["diverged"]

    def _train(self, batch: torch.Tensor) -> float:
        start = time.perf_counter()
        self._method.optimizer.zero_grad()
        loss = half_squared_error(self._model(batch), batch)
        loss.backward()
        if self._method.preconditioner is not None:
            self._method.preconditioner.step()
        self._method.optimizer.step()
        self.seconds += time.perf_counter() - start
        return loss.item()


def _finite(value: float | None) -> float | None:
    """None for what JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None
