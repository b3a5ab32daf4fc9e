"""natgrad against kfac-jax on the classical autoencoder, in turns: `python benchmarks/against_kfac_jax.py`.

784-1000-500-250-30 and back, tanh, Bernoulli cross-entropy, 10,000 images of MNIST as one full batch. Both begin from
the same weights and see the same images. kfac-jax has the settings of its own example for this network; natgrad has its
defaults. README.md beside this file says how to install kfac-jax, whose newest release does not run on today's jax.

The two take turns, five steps each, in one process that may use as many processors as each has threads. Neither the
compilation of kfac-jax (a first step on copies) nor evaluation counts; its burn-in and natgrad's do.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "results" / "kfac_jax"
BLOCK = 5  # Steps in a turn: kfac-jax inverts in every fifth, so each turn of its costs the same.
L2 = 1e-5  # In the loss that kfac-jax minimizes, as in its example; what is compared is the loss without it.
MARKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
Step = Callable[[], float]


def restrict(threads: int) -> None:
    """Give this process so many processors and threads: before torch and jax are imported, which look at it."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if threads == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    # XLA has as many threads as it sees processors, whatever the flags say.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def natgrad_step(model: Any, images: Any) -> Step:
    """A step of natgrad with its defaults; it returns the loss before the step."""
    import natgrad
    from natgrad.experiments.bench.workloads.autoencoders import summed_cross_entropy
    from natgrad.likelihoods import Bernoulli

    optimizer = natgrad.KFAC(model, Bernoulli(reduction="batchmean"))

    def step() -> float:
        optimizer.zero_grad()
        loss = summed_cross_entropy(model(images), images)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def kfac_jax_step(model: Any, images: Any) -> tuple[Step, Callable[[], None]]:
    """A step of kfac-jax, compiled, from the weights of a torch model; and what puts its weights into that model."""
    import jax
    import jax.numpy as jnp
    import kfac_jax
    import optax
    import torch

    batch = jnp.asarray(images.numpy())
    linear = [layer for layer in model if isinstance(layer, torch.nn.Linear)]
    is_followed_by_tanh = [
        isinstance(b, torch.nn.Tanh) for a, b in zip(model, [*model[1:], None], strict=True) if a in linear
    ]

    def loss(params: list[tuple[Any, Any]], x: Any) -> tuple[Any, dict[str, Any]]:
        h = x
        for (weight, bias), has_tanh in zip(params, is_followed_by_tanh, strict=True):
            h = h @ weight + bias
            h = jnp.tanh(h) if has_tanh else h
        kfac_jax.register_sigmoid_cross_entropy_loss(h, x)
        raw = optax.sigmoid_binary_cross_entropy(h, x).sum(axis=1).mean()
        return raw + L2 / 2 * kfac_jax.utils.inner_product(params, params), {"raw": raw}

    # The settings of examples/autoencoder_mnist/pipeline.py.
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss, has_aux=True),
        l2_reg=L2,
        value_func_has_aux=True,
        inverse_update_period=5,
        damping_adaptation_interval=5,
        num_burnin_steps=5,
        curvature_ema=0.95,
        use_adaptive_damping=True,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        damping_adaptation_decay=0.95,
        initial_damping=150.0,
        min_damping=1e-5,
        max_damping=1000.0,
    )

    def initial() -> tuple[Any, Any]:
        params = [
            (jnp.array(layer.weight.detach().numpy().T), jnp.array(layer.bias.detach().numpy())) for layer in linear
        ]
        return params, optimizer.init(params, jax.random.key(0), batch)

    batches = itertools.repeat(batch)
    keys = map(jax.random.key, itertools.count(1))
    jax.block_until_ready(optimizer.step(*initial(), next(keys), data_iterator=batches, global_step_int=0))
    now: dict[str, Any] = dict(zip(("params", "state"), initial(), strict=True), steps=0)

    def step() -> float:
        params, state, stats = optimizer.step(
            now["params"], now["state"], next(keys), data_iterator=batches, global_step_int=now["steps"]
        )
        jax.block_until_ready((params, state))
        now.update(params=params, state=state, steps=now["steps"] + 1)
        return float(stats["aux"]["raw"])

    def export() -> None:
        for layer, (weight, bias) in zip(linear, now["params"], strict=True):
            layer.weight.data.copy_(torch.tensor(jax.device_get(weight)).T)
            layer.bias.data.copy_(torch.tensor(jax.device_get(bias)))

    return step, export


def race(
    steps: dict[str, Step], counts: dict[str, int], show: Callable[[str], None]
) -> dict[str, dict[str, list[float]]]:
    """Let them take turns, until each has taken its number of steps.

    Returns:
        By contestant, step by step: the loss before it, its seconds, and those that the processor spent on it.
    """
    record: dict[str, dict[str, list[float]]] = {name: {"loss": [], "seconds": [], "cpu": []} for name in steps}
    while pending := [name for name in steps if len(record[name]["loss"]) < counts[name]]:
        for name in pending:
            own = record[name]
            for _ in range(min(BLOCK, counts[name] - len(own["loss"]))):
                start, cpu = time.perf_counter(), time.process_time()
                loss = steps[name]()
                own["seconds"].append(round(time.perf_counter() - start, 4))
                own["cpu"].append(round(time.process_time() - cpu, 4))
                own["loss"].append(float(f"{loss:.6g}"))
            show(f"{name:8} {len(own['loss']):4} steps {sum(own['seconds']):8.1f} s  loss {own['loss'][-1]:.5g}")
    return record


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run both; what is written down."""
    import torch

    from natgrad.experiments.bench.workloads import autoencoders
    from natgrad.experiments.runfolder import environment

    torch.set_num_threads(arguments.threads)
    workload = autoencoders.classical("classical", 0.0, arguments.images)
    images, _ = next(workload.batches(0))
    models = {name: workload.model(1) for name in ("natgrad", "kfac-jax")}
    before = time.perf_counter()
    theirs, export = kfac_jax_step(models["kfac-jax"], images)
    setup = time.perf_counter() - before
    steps = {"kfac-jax": theirs, "natgrad": natgrad_step(models["natgrad"], images)}
    record = race(
        steps, {"kfac-jax": arguments.steps, "natgrad": arguments.natgrad_steps}, lambda text: print(text, flush=True)
    )
    export()
    for name, model in models.items():
        with torch.no_grad():
            logits = model(images)
        record[name]["loss"].append(float(f"{autoencoders.summed_cross_entropy(logits, images).item():.6g}"))
        record[name]["train_error"] = [float(f"{autoencoders.squared_error(logits, images).item():.5g}")]
        record[name]["test_error"] = [float(f"{workload.evaluate(model)['test_error']:.5g}")]
    return {
        "title": workload.title,
        "environment": {
            **environment(arguments.threads),
            **{name: metadata.version(name) for name in ("jax", "jaxlib", "kfac-jax")},
            "kfac-jax commit": commit(),
        },
        "kfac-jax compilation and first step, not counted": round(setup, 1),
        "runs": record,
    }


def commit() -> str:
    """The commit from which kfac-jax was installed, as pip wrote it down; empty where it came otherwise."""
    text = metadata.distribution("kfac-jax").read_text("direct_url.json")
    return json.loads(text).get("vcs_info", {}).get("commit_id", "") if text else ""


def tables(result: dict[str, Any]) -> str:
    """What was measured, for readers: how each got on, and how they compare."""
    from natgrad.experiments.table import Sheet

    runs = result["runs"]
    theirs, ours = runs["kfac-jax"], runs["natgrad"]
    goal, total = theirs["loss"][-1], sum(theirs["seconds"])
    reached = next((k for k, loss in enumerate(ours["loss"]) if loss <= goal), None)
    common = min(len(theirs["seconds"]), len(ours["seconds"]))
    first = BLOCK if common > BLOCK else 0  # kfac-jax's burn-in is in its first step
    spent = None if reached is None else sum(ours["seconds"][:reached])
    counts = [k for k in MARKS if k <= max(len(own["seconds"]) for own in runs.values())]
    progress = [(str(k), *(cell for name in ("kfac-jax", "natgrad") for cell in _after(runs[name], k))) for k in counts]
    header = ("steps", "kfac-jax: loss", "seconds", "natgrad: loss", "seconds")
    compared: list[tuple[str, ...] | None] = [
        *(
            _compared(f"{title} a step (means of steps {first + 1} to {common})", runs, key, slice(first, common))
            for title, key in (("seconds", "seconds"), ("processor's seconds", "cpu"))
        ),
        (
            f"seconds to kfac-jax's loss after {len(theirs['seconds'])} steps, {goal:.4g}",
            f"{total:.1f}",
            "–" if spent is None else f"{spent:.1f} ({reached} steps)",
            "–" if spent is None else f"1/{total / spent:.0f}",
        ),
        *(
            (f"{title} at the end", *(f"{runs[name][key][0]:.3g}" for name in ("kfac-jax", "natgrad")), "")
            for title, key in (("training squared error", "train_error"), ("test squared error", "test_error"))
        ),
    ]
    notes = [
        f"Training loss: cross-entropy without kfac-jax's l2 term. {result['title']}. Seconds are of steps alone; the "
        "compilation of kfac-jax is not among them, burn-in is.",
        "Environment: " + ", ".join(f"{key} {value}" for key, value in result["environment"].items()) + ".",
    ]
    sheets = [
        Sheet("natgrad against kfac-jax", ("", "kfac-jax", "natgrad", "ratio"), compared, notes),
        Sheet("Training loss after so many steps", header, list(progress)),
    ]
    return "\n".join(sheet.markdown() for sheet in sheets)


def _compared(title: str, runs: dict[str, dict[str, list[float]]], key: str, steps: slice) -> tuple[str, ...]:
    theirs, ours = (statistics.fmean(runs[name][key][steps]) for name in ("kfac-jax", "natgrad"))
    return title, f"{theirs:.3g}", f"{ours:.3g}", f"{ours / theirs:.2f}"


def _after(run: dict[str, list[float]], steps: int) -> tuple[str, str]:
    """Loss and seconds after so many steps; dashes where there were not so many."""
    if steps > len(run["seconds"]):
        return "–", "–"
    return f"{run['loss'][steps]:.4g}", f"{sum(run['seconds'][:steps]):.1f}"


def main() -> None:
    """Measure, or only write the table again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of kfac-jax")
    parser.add_argument("--natgrad-steps", type=int, default=50)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1, help="and processors, of both")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="write the table of the records in --out again")
    arguments = parser.parse_args()
    file = arguments.out / "runs.json"
    if not arguments.table:
        restrict(arguments.threads)
        result = measure(arguments)
        arguments.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
    text = tables(json.loads(file.read_text()))
    (arguments.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
