"""Physics-informed networks as people write them: `python benchmarks/differential_equations.py`.

A network u(x) learns from the residuals of a differential equation, which `torch.autograd.grad` makes, and of its
conditions, at other points; each has a mean square as its loss. Contestants: `natgrad.KFAC` with its defaults, L-BFGS
with torch's line search, and Adam with three rates, each falling linearly to zero. Every run starts from the same
weights and points and stops after the same seconds of training, in float32; contestants of a problem run one after the
other. What counts is the relative error of u at 4,000 other points in the end, and for Burgers' equation, whose
solution has no closed form, the loss.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import natgrad
from natgrad.experiments.runfolder import environment, write_json
from natgrad.experiments.table import Sheet

OUT = Path(__file__).parent / "results" / "differential_equations"
RATES = (1e-3, 3e-3, 1e-2)
CONTESTANTS = ("kfac", "lbfgs", *map(str, RATES))
TEST = 4_000
Points = tuple[Tensor, ...]
Residuals = dict[str, Tensor]


def gradient(f: Tensor, x: Tensor) -> Tensor:
    """Of each f by its own x."""
    return torch.autograd.grad(f.sum(), x, create_graph=True)[0]


def second(f: Tensor, x: Tensor, axis: int) -> Tensor:
    """∂²f/∂x² along one axis, (N, 1)."""
    return gradient(gradient(f, x)[:, axis], x)[:, axis : axis + 1]


def on_sides(generator: torch.Generator, number: int, axes: tuple[int, ...], dimension: int = 2) -> Tensor:
    """So many points of the unit cube for each of two opposite sides of each axis."""
    sides = []
    for axis in axes:
        for end in (0.0, 1.0):
            x = torch.rand(number, dimension, generator=generator)
            x[:, axis] = end
            sides.append(x)
    return torch.cat(sides)


@dataclass(frozen=True)
class Problem:
    """A differential equation.

    Attributes:
        title: For the table.
        dimension: Of x.
        points: Where residuals are taken: inside, and for each condition.
        residuals: Of the network at these points, by name, each (N, 1).
        weights: Of their mean squares.
        solution: u, if it is known, (N, 1).
        wave: Whether activations are sines, and not hyperbolic tangents.
    """

    title: str
    dimension: int
    points: Callable[[torch.Generator], Points]
    residuals: Callable[[nn.Module, Points], Residuals]
    weights: dict[str, float]
    solution: Callable[[Tensor], Tensor] | None
    wave: bool = False


class Sine(nn.Module):
    """An activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Of each entry."""
        return x.sin()


class Network(nn.Module):
    """u with three hidden layers of 64, and the residuals of its problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        sizes = [problem.dimension, 64, 64, 64]
        activation = Sine if problem.wave else nn.Tanh
        hidden = [module for i in range(3) for module in (nn.Linear(sizes[i], sizes[i + 1]), activation())]
        self.u, self.problem = nn.Sequential(*hidden, nn.Linear(64, 1)), problem

    def forward(self, *points: Tensor) -> Residuals:
        """By name; the points are detached first, and require gradients."""
        return self.problem.residuals(self.u, tuple(x.detach().requires_grad_() for x in points))


def product_of_sines(x: Tensor, second_frequency: int = 1) -> Tensor:
    """Sin πx sin kπy."""
    return (math.pi * x[:, :1]).sin() * (second_frequency * math.pi * x[:, 1:2]).sin()


def poisson() -> Problem:
    """−Δu = 2π² u* in the unit square."""

    def residuals(u: nn.Module, points: Points) -> Residuals:
        x, sides = points
        f = u(x)
        return {"inside": second(f, x, 0) + second(f, x, 1) + 2 * math.pi**2 * product_of_sines(x), "sides": u(sides)}

    def points(generator: torch.Generator) -> Points:
        return torch.rand(900, 2, generator=generator), on_sides(generator, 30, (0, 1))

    return Problem("Poisson, 2 dimensions", 2, points, residuals, {"inside": 1, "sides": 100}, product_of_sines)


def poisson_5() -> Problem:
    """−Δu = π² u in the unit cube of five dimensions, with u = Σ cos πx given on its sides."""

    def solution(x: Tensor) -> Tensor:
        return (math.pi * x).cos().sum(1, keepdim=True)

    def residuals(u: nn.Module, points: Points) -> Residuals:
        x, sides = points
        f = u(x)
        laplacian = torch.stack([second(f, x, axis) for axis in range(5)]).sum(0)
        return {"inside": laplacian + math.pi**2 * solution(x), "sides": u(sides) - solution(sides)}

    def points(generator: torch.Generator) -> Points:
        return torch.rand(1_000, 5, generator=generator), on_sides(generator, 50, tuple(range(5)), 5)

    return Problem("Poisson, 5 dimensions", 5, points, residuals, {"inside": 1, "sides": 100}, solution)


def helmholtz() -> Problem:
    """Δu + u = f with four half waves along one axis."""

    def solution(x: Tensor) -> Tensor:
        return product_of_sines(x, 4)

    def residuals(u: nn.Module, points: Points) -> Residuals:
        x, sides = points
        f = u(x)
        inside = second(f, x, 0) + second(f, x, 1) + f + (17 * math.pi**2 - 1) * solution(x)
        return {"inside": inside, "sides": u(sides)}

    def points(generator: torch.Generator) -> Points:
        return torch.rand(900, 2, generator=generator), on_sides(generator, 30, (0, 1))

    return Problem("Helmholtz", 2, points, residuals, {"inside": 1, "sides": 100}, solution)


def in_time(generator: torch.Generator) -> Points:
    """Inside, at both ends at all times, and at the start."""
    start = torch.rand(200, 2, generator=generator)
    start[:, 1] = 0
    return torch.rand(1_000, 2, generator=generator), on_sides(generator, 50, (0,)), start


def heat() -> Problem:
    """u_t = 0.1 u_xx from two half waves."""

    def solution(x: Tensor) -> Tensor:
        modes = [(1, 1.0), (3, 0.5)]
        each = [a * (k * math.pi * x[:, :1]).sin() * (-0.1 * (k * math.pi) ** 2 * x[:, 1:]).exp() for k, a in modes]
        return each[0] + each[1]

    def residuals(u: nn.Module, points: Points) -> Residuals:
        x, ends, start = points
        f = u(x)
        inside = gradient(f, x)[:, 1:] - 0.1 * second(f, x, 0)
        return {"inside": inside, "ends": u(ends), "start": u(start) - solution(start)}

    return Problem("heat", 2, in_time, residuals, {"inside": 1, "ends": 100, "start": 100}, solution)


def wave() -> Problem:
    """u_tt = 4 u_xx from rest."""

    def solution(x: Tensor) -> Tensor:
        modes = [(1, 1.0), (3, 0.5)]
        each = [a * (k * math.pi * x[:, :1]).sin() * (2 * k * math.pi * x[:, 1:]).cos() for k, a in modes]
        return each[0] + each[1]

    def residuals(u: nn.Module, points: Points) -> Residuals:
        x, ends, start = points
        f, first = u(x), u(start)
        inside = second(f, x, 1) - 4 * second(f, x, 0)
        speed = gradient(first, start)[:, 1:]
        return {"inside": inside, "ends": u(ends), "start": first - solution(start), "speed": speed}

    weights = {"inside": 1.0, "ends": 100.0, "start": 100.0, "speed": 10.0}
    return Problem("wave", 2, in_time, residuals, weights, solution, wave=True)


def burgers() -> Problem:
    """u_t + u u_x = 0.01 / π u_xx on −1 < x < 1, which steepens to a front."""

    def residuals(u: nn.Module, points: Points) -> Residuals:
        x, ends, start = points
        f = u(x)
        slope = gradient(f, x)
        inside = slope[:, 1:] + f * slope[:, :1] - 0.01 / math.pi * second(f, x, 0)
        return {"inside": inside, "ends": u(ends), "start": u(start) + (math.pi * start[:, :1]).sin()}

    def points(generator: torch.Generator) -> Points:
        unit = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])
        x, ends, start = in_time(generator)
        return x * unit[0] - unit[1], ends * unit[0] - unit[1], start * unit[0] - unit[1]

    return Problem("Burgers (loss)", 2, points, residuals, {"inside": 1, "ends": 10, "start": 10}, None)


PROBLEMS = {f.__name__: f() for f in (poisson, poisson_5, helmholtz, heat, wave, burgers)}


@dataclass(frozen=True)
class Row:
    """What one run came to: the error of u, or the loss where u is not known; steps, and seconds of training."""

    problem: str
    contestant: str
    seed: int
    error: float
    loss: float
    steps: int
    seconds: float


def run(name: str, contestant: str, seed: int, seconds: float) -> Row:
    """Train for so long."""
    problem = PROBLEMS[name]
    torch.manual_seed(seed)
    model, generator = Network(problem), torch.Generator().manual_seed(1_000 + seed)
    points = problem.points(generator)
    optimizer: torch.optim.Optimizer
    if contestant == "kfac":
        optimizer = natgrad.KFAC(model, {key: (weight, "mse") for key, weight in problem.weights.items()})
    elif contestant == "lbfgs":
        optimizer = torch.optim.LBFGS(model.parameters(), history_size=50, line_search_fn="strong_wolfe")
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=float(contestant), fused=True)

    def loss() -> Tensor:
        optimizer.zero_grad()
        residuals = model(*points)
        value = torch.stack([w * residuals[key].square().mean() for key, w in problem.weights.items()]).sum()
        value.backward()
        return value.detach()

    used, steps, value = 0.0, 0, math.nan
    while used < seconds:
        start = time.perf_counter()
        if contestant not in ("kfac", "lbfgs"):
            optimizer.param_groups[0]["lr"] = float(contestant) * (1 - used / seconds)
        value = float(optimizer.step(loss))
        used += time.perf_counter() - start
        steps += 1
    x = torch.rand(TEST, problem.dimension, generator=generator)
    error = value
    if problem.solution is not None:
        u, exact = model.u(x).detach(), problem.solution(x)
        error = float((u - exact).norm() / exact.norm())
    return Row(name, contestant, seed, error, value, steps, used)


def table(rows: list[Row]) -> str:
    """Medians over seeds, with Adam's best rate, for readers."""
    seeds = sorted({row.seed for row in rows})
    lines = []
    for name in dict.fromkeys(row.problem for row in rows):
        own = [row for row in rows if row.problem == name]
        median = {
            c: statistics.median(row.error for row in own if row.contestant == c)
            for c in {row.contestant for row in own}
        }
        rate = min((c for c in median if c not in ("kfac", "lbfgs")), key=median.__getitem__)
        cells = []
        for contestant in ("kfac", "lbfgs", rate):
            errors = [row.error for row in own if row.contestant == contestant]
            steps = statistics.median(row.steps for row in own if row.contestant == contestant)
            cells.append(f"{median[contestant]:.1e} ({min(errors):.1e} to {max(errors):.1e}); {steps:.0f}")
        lines.append((PROBLEMS[name].title, *cells, rate))
    note = (
        f"Relative error of u after {rows[0].seconds:.0f} seconds, float32, median of seeds {seeds} with the range; "
        "then steps, of L-BFGS those of 20 iterations each."
    )
    header = ("", "natgrad.KFAC, defaults", "L-BFGS", f"Adam, best of {len(RATES)} rates", "rate")
    return Sheet("Differential equations", header, list(lines), [note]).markdown()


def main() -> None:
    """Run what is not recorded yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=tuple(PROBLEMS), choices=tuple(PROBLEMS))
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--seconds", type=float, default=20.0, help="of training, each run")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "environment.json", environment(1))
    file = arguments.out / "rows.jsonl"
    rows = [Row(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row.problem, row.contestant, row.seed) for row in rows}
    for name in arguments.problems:
        for seed in arguments.seeds:
            for contestant in arguments.contestants:
                if (name, contestant, seed) not in done:
                    rows.append(run(name, contestant, seed, arguments.seconds))
                    print(rows[-1], flush=True)
                    with file.open("a") as records:
                        print(json.dumps(asdict(rows[-1])), file=records)
    (arguments.out / "table.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
