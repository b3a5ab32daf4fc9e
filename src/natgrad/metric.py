"""Stages 4 and 5 over all layers: when inverses are refreshed, with what damping, and on which rank.

What enters are the factors of a batch and what it tells of the noise; what leaves are running factors and inverses, in
the state of each layer. The noise of the gradient is measured in the metric that these make, and decides about the
damping of the next ones.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from natgrad import damping as dampings
from natgrad import diagnostics, exchange, noise, polar, schedule
from natgrad.averaging import noise_left
from natgrad.batch import Batch
from natgrad.damping import DampingRule
from natgrad.distributed import World
from natgrad.factors import automatic_decay, flush, share_known, update_average
from natgrad.inverses import INVERSES, Inverse
from natgrad.layers import Bases, Layer
from natgrad.products import rounding
from natgrad.schedule import Period
from natgrad.state import MOVED
from natgrad.trust import Trust

# Names of what an inverse of any kind keeps.
OF_ANY = {name for inverse in INVERSES.values() for name in inverse.names}

States = Mapping[str, dict[str, Any]]
Matrix = Callable[[Layer], Tensor | None]
# Inverses by layer name, and their dampings.
Placed = tuple[dict[str, dict[str, Tensor]], dict[str, diagnostics.Applied]]


class Metric:
    """The inverses of all layers.

    Args:
        layers: The layers.
        inverse: How a damped block is inverted.
        rule: What is added to the factors.
        period: Between updates.
        world: The ranks, with an owner for each layer.

    Attributes:
        applied: Damping of the latest inverse of each layer, and number of the step, since construction or loading.
        moved: Layers whose factors are newer than their inverse.
        renewed: Whether most inverses were refreshed at the latest update.
    """

    def __init__(
        self, layers: Sequence[Layer], inverse: Inverse, rule: DampingRule, period: Period, world: World
    ) -> None:
        if inverse.corrects and not world.replicates:
            raise ValueError(
                '`inverse="ekfac"` needs the bases on every rank, for its data: use `inverses="comm"`, or "eigen".'
            )
        self.inverse, self.rule, self.period, self.world = inverse, rule, period, world
        self._deal(layers)
        self.applied: dict[str, diagnostics.Applied] = {}
        self.moved: set[str] = set()
        self.renewed = False
        self._inverted: set[str] | None = None  # who have an inverse on every rank that holds it, once agreed

    def choose(self, layers: Sequence[Layer], states: States) -> None:
        """From now on these are the layers."""
        self._deal(layers)
        self.forget(states)

    def _deal(self, layers: Sequence[Layer]) -> None:
        self.layers, self._costs = layers, {layer.name: layer.inversion_cost for layer in layers}
        self.world.deal(self._costs)

    def forget(self, states: States) -> None:
        """The state has become another; inverses of another kind are dropped, and those that are other ranks'."""
        self.applied.clear()
        for name, state in states.items():
            held = self.inverse.names if self.world.holds(name) else ()
            for key in OF_ANY - set(held):
                state.pop(key, None)
        self.moved, self._inverted = {name for name, state in states.items() if state.get(MOVED, True)}, None

    def restore(self, states: States, step: int) -> None:
        """Make anew the inverses that a checkpoint lacks, as it has those of the rank that wrote it.

        From the factors and the noise in it, they are what they were if they had been refreshed at its last step.
        """
        known = self._inverted is not None
        inverted = self._agree(states)
        if not known:
            missing = [layer for layer in self.layers if "A" in states[layer.name] and layer.name not in inverted]
            self._refresh(missing, states, step)

    def due(self, step: int) -> set[str]:
        """Whose inverse it is time to refresh."""
        return schedule.turn(step, self.period, self._costs)

    def bases(self, layer: Layer, state: Mapping[str, Any], step: int) -> Bases | None:
        """Where second moments are wanted; not just before new bases, in which they would start anew."""
        wanted = self.inverse.corrects and "A_basis" in state and layer.name not in self.due(step)
        return (state["A_basis"], state["G_basis"]) if wanted else None

    def fold(
        self, layer: Layer, state: dict[str, Any], batch: Batch, decay: float | Literal["auto"], averages: bool
    ) -> None:
        """Fold what a batch tells of one layer's factors, and of their product's eigenvalues, into what is kept."""
        if (factors := batch.factors(layer)) is None:
            return
        rows, all_rows = batch.rows(layer.name)
        if decay == "auto":
            decay = automatic_decay(share_known(rows, max(layer.shape)), averages)
        update_average(state, {"A": factors[0], "G": factors[1]}, decay)
        state["rows"] = torch.tensor(all_rows, dtype=torch.float32)
        self.moved.add(layer.name)
        if (spectrum := batch.spectrum(layer)) is not None:
            update_average(state, {"spectrum": spectrum}, decay, "spectrum_age")

    def update(self, states: States, batch: Batch, matrix: Matrix, step: int, averages: bool) -> None:
        """Measure the noise by the metric that is there, and then refresh what is due.

        Args:
            states: Of each layer, by name.
            batch: Whose factors are in them.
            matrix: From a layer to its gradient.
            step: Number of the step.
            averages: Whether the metric is for gradients that are averaged over batches.
        """
        started = [layer for layer in self.layers if "A" in states[layer.name]]
        missing = {layer.name for layer in started} - self._agree(states)
        if batch.samples and len(missing) == len(started):
            # There is no metric yet: a first one stands on no evidence, and is good enough to gather some for the next.
            for _ in range(2):
                self._refresh(started, states, step)
                self._measure(batch, states, matrix, anew=True)
        else:
            self._measure(batch, states, matrix, anew=False)
        stale = missing | (self.moved & self.due(step))
        refreshed = [layer for layer in started if layer.name in stale]
        self.renewed = 2 * len(refreshed) > len(started)
        if refreshed:  # not in `restore`, which takes what was settled when the lost inverses were made
            Trust(states[self.layers[0].name]).settle(averages)
        self._refresh(refreshed, states, step)

    def stiffen(self, states: States, step: int, stiffening: float) -> None:
        """Make all inverses anew with another stiffening than the settled one, as if at this step."""
        inverted = self._agree(states)
        self._refresh([layer for layer in self.layers if layer.name in inverted], states, step, stiffening)

    def placed(self, states: States) -> Placed:
        """The inverses as they are, to be put back by ``place``."""
        kept = {name: {k: state[k] for k in self.inverse.names if k in state} for name, state in states.items()}
        return kept, dict(self.applied)

    def place(self, states: States, placed: Placed) -> None:
        """Put inverses back in place."""
        kept, self.applied = placed
        for name, inverse in kept.items():
            states[name].update(inverse)

    def solve(self, states: States, matrix: Matrix, averaged: bool) -> dict[str, Tensor]:
        """The natural gradient of every layer that has factors and a gradient, as a matrix by its name.

        Args:
            states: Of each layer, by name.
            matrix: From a layer to its gradient.
            averaged: Whether gradients are averages over batches.
        """
        solutions: dict[str, Tensor] = {}
        shares = noise.known(states.values()) if averaged else []
        # Then damping is as heavy as rounded products want it; of a given one nobody knows.
        with rounding(averaged and self.rule is dampings.automatic):
            for layer in self.layers:
                V = matrix(layer)
                if V is not None:
                    held = self.world.holds(layer.name)
                    solutions[layer.name] = self._solve(states[layer.name], V, shares) if held else torch.empty_like(V)
        exchange.share_solutions(solutions, self.world)
        return solutions

    def _solve(self, state: dict[str, Any], V: Tensor, shares: list[float]) -> Tensor:
        """The natural gradient of one layer; evened out, if it is of averages whose shares of noise are known.

        What has no gradient at all, as where the loop masks it, stays where it is: that changes no slope.
        """
        natural = self.inverse.solve(state, V)
        if shares and not self.inverse.corrects and polar.pays(float(state.get("rows", 0)), V):
            share = float(state["noise"]) if "noise" in state else noise.mean(shares)
            natural = polar.orthogonalize(V, natural, noise_left(share))
        return natural.masked_fill_(V.logical_not(), 0.0)

    def _agree(self, states: States) -> set[str]:
        """Who have an inverse on every rank that holds it."""
        if self._inverted is None:
            # A distributed checkpoint takes each tensor from any rank, so that half an inverse may be there.
            names = set(self.inverse.names)
            lacking = [self.world.holds(layer.name) and not names <= states[layer.name].keys() for layer in self.layers]
            totals = self.world.sum(lacking, self.layers[0].parameters[0]).tolist()
            self._inverted = {layer.name for layer, total in zip(self.layers, totals, strict=True) if not total}
        return self._inverted

    def _measure(self, batch: Batch, states: States, matrix: Matrix, anew: bool) -> None:
        measured: dict[str, Tensor] = {}
        for layer in self.layers:
            samples = batch.samples.get(layer.name)
            if samples and (V := matrix(layer)) is not None and layer.name in self._agree(states):
                lent = exchange.lent(layer, states[layer.name], self.inverse.names, self.world)
                with lent as inverse, rounding(True):  # lengths bear it whatever the damping: they are sums, of samples
                    measured[layer.name] = noise.measure(layer, V, samples, self.inverse, inverse, batch.scaler)
        for name, sums in exchange.share_noise(measured, self.world).items():
            latest = noise.split(*sums)
            if latest is not None:
                noise.remember(states[name], *latest, anew)

    def _refresh(self, layers: list[Layer], states: States, step: int, tried: float | None = None) -> None:
        """Make inverses anew; with a stiffening that is tried, their λ_G alone."""
        if not layers:
            return
        filled = [state for state in states.values() if "A" in state]
        curvature = dampings.mean_curvature([state["G"] for state in filled if state["A"].shape[-2] > 1])
        trust = Trust(states[self.layers[0].name])
        stiffening = trust.stiffening if tried is None else tried
        pooled = noise.ratio(noise.known(filled))
        for layer in layers:
            state = states[layer.name]
            flush(state["A"])
            flush(state["G"])
            own = noise.ratio([float(state["noise"])]) if "noise" in state else pooled
            evidence = dampings.Evidence(
                own, curvature, trust.settled_share, trust.ease, trust.settled_average, stiffening
            )
            damping = self.rule(state["A"], state["G"], evidence)
            if self.world.owns(layer.name):
                known = {} if tried is None else state
                state.update(self.inverse.factorize(state["A"], state["G"], damping, known))
            self.applied[layer.name] = diagnostics.Applied(damping, step)
            self.moved.discard(layer.name)
        exchange.share_inverses(layers, states, self.inverse.names, self.world)
        self._agree(states).update(layer.name for layer in layers)
