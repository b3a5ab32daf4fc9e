"""What a step of natgrad and of every other K-FAC for PyTorch costs: `python benchmarks/against_torch_kfac.py`.

The same network, the same batches, the same periods: factors and inverses renewed at every step, or at every tenth.
Contestants take turns step by step, ten steps a block; after a block to warm up, a block gives each the ratio of its
time to that of plain SGD, and the median of the blocks counts. Each is used as its documentation says, with
its defaults but for the periods and a damping that keeps it finite. README.md beside this file says how to install
them. A package that is missing, or fails, is listed with what it said.
"""

import argparse
import importlib
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import natgrad
from natgrad.experiments.bench.workload import Workload
from natgrad.experiments.bench.workloads import find
from natgrad.experiments.runfolder import environment, write_json
from natgrad.experiments.table import Sheet

OUT = Path(__file__).parent / "results" / "torch_kfac"
WORKLOADS = ("autoencoder-quarter", "mlp", "convnet")
PERIODS = (1, 10)
BLOCK = 10  # Steps: a multiple of the periods.
LR, DAMPING = 1e-3, 1e-2
PLAIN = "sgd"
Step = Callable[[Tensor, Tensor], None]
Build = Callable[[nn.Module, Workload, int], Step]


@dataclass(frozen=True)
class Peer:
    """A contestant: how it is shown, the distribution whose version is recorded, and what builds a step of it."""

    label: str
    distribution: str
    build: Build


PEERS: dict[str, Peer] = {}


def peer(name: str, label: str, distribution: str = "torch") -> Callable[[Build], Build]:
    """Register what builds a contestant's step from a model, a workload and a period."""

    def register(build: Build) -> Build:
        PEERS[name] = Peer(label, distribution, build)
        return build

    return register


def training(model: nn.Module, workload: Workload, *moves: Callable[[], object]) -> Step:
    """The loop that everybody knows, with what follows `backward`."""

    def step(x: Tensor, y: Tensor) -> None:
        model.zero_grad()
        workload.loss(model(x), y).backward()
        for move in moves:
            move()

    return step


def sgd(model: nn.Module) -> Callable[[], object]:
    """The step of plain SGD."""
    return torch.optim.SGD(model.parameters(), lr=LR).step


def classifies(workload: Workload) -> bool:
    """Whether the loss is the cross-entropy; otherwise it is a squared error."""
    return workload.natgrad_loss == "cross_entropy"


@peer(PLAIN, "SGD")
def _sgd(model: nn.Module, workload: Workload, period: int) -> Step:
    return training(model, workload, sgd(model))


@peer("kfac", "natgrad.KFAC", "natgrad")
def _kfac(model: nn.Module, workload: Workload, period: int) -> Step:
    """Everything automatic: damping, and rate and momentum from the exact quadratic model, which the others lack."""
    optimizer = natgrad.KFAC(model, workload.natgrad_loss, curvature_period=period, inverse_period=period)
    return training(model, workload, optimizer.step)


@peer("preconditioner", "natgrad.Preconditioner + SGD", "natgrad")
def _preconditioner(model: nn.Module, workload: Workload, period: int) -> Step:
    """What the others do: a damping and a rate that are given."""
    own = natgrad.Preconditioner(
        model, workload.natgrad_loss, damping=DAMPING, curvature_period=period, inverse_period=period
    )
    return training(model, workload, own.step, sgd(model))


def _kfac_pytorch(model: nn.Module, workload: Workload, period: int, *, method: str) -> Step:
    preconditioner = importlib.import_module("kfac.preconditioner").KFACPreconditioner(
        model, factor_update_steps=period, inv_update_steps=period, damping=DAMPING, lr=LR, compute_method=method
    )
    return training(model, workload, preconditioner.step, sgd(model))


peer("kfac_pytorch", "kfac_pytorch", "kfac_pytorch")(partial(_kfac_pytorch, method="eigen"))
peer("kfac_pytorch-inverse", "kfac_pytorch, inverses", "kfac_pytorch")(partial(_kfac_pytorch, method="inverse"))


def _asdl(model: nn.Module, workload: Workload, period: int, *, fisher: str) -> Step:
    asdl = importlib.import_module("asdl")
    # It marks its parts for NVIDIA's profiler, and a torch without CUDA refuses to.
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: 0
    config = asdl.PreconditioningConfig(
        data_size=1, damping=DAMPING, ema_decay=0.05, preconditioner_upd_interval=period, curvature_upd_interval=period
    )
    kind = "cross_entropy" if classifies(workload) else "mse"
    loss = nn.functional.cross_entropy if classifies(workload) else nn.functional.mse_loss  # it takes torch's own only
    maker = asdl.KfacGradientMaker(model, config, fisher_type=fisher, loss_type=kind)
    update = sgd(model)

    def step(x: Tensor, y: Tensor) -> None:
        model.zero_grad()
        output = maker.setup_model_call(model, x)
        maker.setup_loss_call(loss, output, y)
        maker.forward_and_backward()
        update()

    return step


peer("asdl", "ASDL", "asdfghjkl")(partial(_asdl, fisher="fisher_mc"))
peer("asdl-empirical", "ASDL, empirical Fisher", "asdfghjkl")(partial(_asdl, fisher="fisher_emp"))


@peer("singd", "SINGD", "singd")
def _singd(model: nn.Module, workload: Workload, period: int) -> Step:
    """Dense structures; SGD for what it does not know."""
    supported = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    optimizer = importlib.import_module("singd.optim.optimizer").SINGD(
        model, lr=LR, damping=DAMPING, T=period, loss_average="batch", warn_unsupported=False
    )
    chosen = {id(p) for m in supported for p in m.parameters(recurse=False)}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return training(model, workload, optimizer.step, *([torch.optim.SGD(rest, lr=LR).step] if rest else []))


@peer("torch-kfac", "torch-kfac", "torch-kfac")
def _torch_kfac(model: nn.Module, workload: Workload, period: int) -> Step:
    """It inverts at every step; there is no period."""
    if period > 1:
        raise NotImplementedError("torch-kfac has no period: it inverts its factors at every step")
    optimizer = importlib.import_module("torch_kfac").KFAC(model, learning_rate=LR, damping=DAMPING)

    def step(x: Tensor, y: Tensor) -> None:
        model.zero_grad()
        with optimizer.track_forward():
            loss = workload.loss(model(x), y)
        with optimizer.track_backward():
            loss.backward()
        optimizer.step()

    return step


@peer("ekfac-pytorch", "EKFAC-pytorch's KFAC", "")
def _ekfac_pytorch(model: nn.Module, workload: Workload, period: int) -> Step:
    own = importlib.import_module("ekfac_pytorch.kfac").KFAC(model, eps=DAMPING, update_freq=period)
    return training(model, workload, own.step, sgd(model))


@peer("nngeometry", "NNGeometry, by hand", "nngeometry")
def _nngeometry(model: nn.Module, workload: Workload, period: int) -> Step:
    """It has the matrices, and no optimizer: they are made, inverted and multiplied as its documentation does."""
    metrics = importlib.import_module("nngeometry.metrics")
    objects = importlib.import_module("nngeometry.object")
    variant = "classif_logits" if classifies(workload) else "regression"

    def inverse(x: Tensor, y: Tensor) -> Any:
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x))
        fisher = metrics.FIM_MonteCarlo(model, loader, objects.PMatKFAC, variant=variant)
        return fisher.inverse(regul=DAMPING)

    def multiply(matrix: Any) -> None:
        natural = matrix.mv(objects.PVector.from_model_grad(model))
        (-LR * natural).add_to_model(model)

    return _by_hand(model, workload, period, inverse, multiply)


@peer("curvlinops", "curvlinops, by hand", "curvlinops-for-pytorch")
def _curvlinops(model: nn.Module, workload: Workload, period: int) -> Step:
    """It has the matrices, and no optimizer; SGD for the parameters that it does not know."""
    curvlinops = importlib.import_module("curvlinops")
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    params = [p for m in layers for p in m.parameters(recurse=False)]
    chosen = {id(p) for p in params}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    loss = nn.CrossEntropyLoss() if classifies(workload) else nn.MSELoss()

    def inverse(x: Tensor, y: Tensor) -> Any:
        kfac = curvlinops.KFACLinearOperator(
            model, loss, params, [(x, y)], check_deterministic=False, separate_weight_and_bias=False
        )
        return curvlinops.KFACInverseLinearOperator(kfac, damping=DAMPING, use_heuristic_damping=True)

    def multiply(matrix: Any) -> None:
        for parameter, natural in zip(params, matrix @ [p.grad for p in params], strict=True):
            parameter.data.sub_(natural, alpha=LR)
        for parameter in rest:
            parameter.data.sub_(parameter.grad, alpha=LR)

    return _by_hand(model, workload, period, inverse, multiply)


def _by_hand(
    model: nn.Module,
    workload: Workload,
    period: int,
    inverse: Callable[[Tensor, Tensor], Any],
    multiply: Callable[[Any], None],
) -> Step:
    steps, matrix = 0, None

    def step(x: Tensor, y: Tensor) -> None:
        nonlocal steps, matrix
        if steps % period == 0:
            matrix = inverse(x, y)
        steps += 1
        model.zero_grad()
        workload.loss(model(x), y).backward()
        multiply(matrix)

    return step


@dataclass
class Row:
    """What was measured of one contestant on one workload at one period.

    Attributes:
        workload: Its name.
        period: Steps between renewals of factors and inverses.
        peer: Its name.
        version: Of its distribution; empty where it has none.
        seconds: Mean of a step, over all blocks.
        ratios: To plain SGD, block by block.
        failure: Why there is nothing of this.
    """

    workload: str
    period: int
    peer: str
    version: str
    seconds: float
    ratios: list[float]
    failure: str = ""


def measure(workload: Workload, period: int, names: list[str], blocks: int) -> Iterator[Row]:
    """Let the contestants take turns for so many blocks, after one that is not counted."""
    batches = workload.batches(1)
    warm_up = [next(batches) for _ in range(2)]
    steps: dict[str, Step] = {}
    for name in names:
        model = workload.model(1)
        with _failing_quietly(workload, period, name) as failed:
            step = PEERS[name].build(model, workload, period)
            for batch in warm_up:
                step(*batch)
            if not all(parameter.isfinite().all() for parameter in model.parameters()):
                raise ArithmeticError("the parameters are no longer finite")
            steps[name] = step
        yield from failed
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(blocks + 1):
        spent = dict.fromkeys(steps, 0.0)
        for _ in range(BLOCK):
            batch = next(batches)
            for name, step in steps.items():
                start = time.perf_counter()
                step(*batch)
                spent[name] += time.perf_counter() - start
        for name, own in spent.items():
            seconds[name].append(own)
    for name, own in seconds.items():
        ratios = [round(a / b, 3) for a, b in zip(own[1:], seconds[PLAIN][1:], strict=True)]
        mean = statistics.fmean(own[1:]) / BLOCK
        yield Row(workload.name, period, name, version(name), float(f"{mean:.4g}"), ratios)


@contextmanager
def _failing_quietly(workload: Workload, period: int, name: str) -> Iterator[list[Row]]:
    """What is raised inside becomes a row with the first line of its message."""
    failed: list[Row] = []
    try:
        yield failed
    except Exception as error:  # of anybody's package, which must not end the benchmark
        text = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        print(f"{workload.name}, period {period}: {name}: {text}", flush=True)
        failed.append(Row(workload.name, period, name, version(name), 0.0, [], text))


def version(name: str) -> str:
    """Of a contestant's distribution; empty where it has none."""
    distribution = PEERS[name].distribution
    try:  # natgrad may be run from its sources
        return natgrad.__version__ if distribution == "natgrad" else metadata.version(distribution)
    except (metadata.PackageNotFoundError, ValueError):
        return ""


def tables(rows: list[Row]) -> str:
    """What a step costs over plain SGD, and who has no figure, for readers."""
    cases = list(dict.fromkeys((row.workload, row.period) for row in rows))
    by_key = {(row.workload, row.period, row.peer): row for row in rows}
    names = [name for name in PEERS if any(row.peer == name and row.ratios for row in rows)]
    versions = {row.peer: row.version for row in rows}
    lines = []
    for name in names:
        found = [by_key.get((*case, name)) for case in cases]
        cells = [f"{statistics.median(row.ratios):.2f}" if row and row.ratios else "–" for row in found]
        lines.append((PEERS[name].label, versions[name], *cells))
    plain = [by_key[(*case, PLAIN)].seconds for case in cases]
    lines.append(("plain SGD: milliseconds a step", "", *(f"{1000 * seconds:.3g}" for seconds in plain)))
    failures = dict.fromkeys((PEERS[row.peer].label, row.workload, row.failure) for row in rows if row.failure)
    header = ("", "version", *(f"{workload}, every {period}" for workload, period in cases))
    note = (
        "Median over blocks of ten steps of the ratio to plain SGD (forward, backward, update), factors and inverses "
        "renewed at every step or at every tenth."
    )
    sheets = [Sheet("A step, over a step of plain SGD", header, list(lines), [note], text_columns=2)]
    if failures:
        sheets.append(Sheet("No figure", ("", "workload", "what it said"), list(failures), text_columns=3))
    return "\n".join(sheet.markdown() for sheet in sheets)


def main() -> None:
    """Measure and write the table, or only write the table again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS)
    parser.add_argument("--peers", nargs="+", default=tuple(PEERS), choices=tuple(PEERS))
    parser.add_argument("--periods", nargs="+", type=int, default=PERIODS)
    parser.add_argument("--blocks", type=int, default=3, help="of ten steps, to count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="write the table of the records in --out again")
    arguments = parser.parse_args()
    file = arguments.out / "rows.jsonl"
    if not arguments.table:
        torch.set_num_threads(arguments.threads)
        warnings.simplefilter("ignore")  # The peers' own, for what torch has deprecated since.
        names = list(dict.fromkeys([PLAIN, *arguments.peers]))
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / "environment.json", environment(arguments.threads))
        with file.open("w") as records:
            for workload, period in itertools.product(arguments.workloads, arguments.periods):
                print(f"{workload}, period {period}", flush=True)
                for row in measure(find(workload)(), period, names, arguments.blocks):
                    print(json.dumps(asdict(row)), file=records, flush=True)
    rows = [Row(**json.loads(line)) for line in file.read_text().splitlines()]
    text = tables(rows)
    (arguments.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
