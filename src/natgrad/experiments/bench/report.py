"""``table.md``, ``profile.png`` and ``curves.png``: the results of a folder, for readers.

The tuned track shows natgrad with its defaults as well, beside the rivals' best settings: a user who tunes nothing gets
the former.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console

from natgrad.experiments.bench.contestants import CONTESTANTS
from natgrad.experiments.bench.memory import read_memory
from natgrad.experiments.bench.records import Folder
from natgrad.experiments.bench.results import REFERENCE, Result, Spread, profile, results, runs, target
from natgrad.experiments.bench.spaces import DECAY
from natgrad.experiments.bench.style import COLOURS, finish, save
from natgrad.experiments.bench.workloads import WORKLOADS
from natgrad.experiments.figures import GREY, new_figure
from natgrad.experiments.table import Sheet

TITLES = {"tuned": "Every contestant tuned", "defaults": "Every contestant with its defaults"}
TARGET_NOTE = (
    "Target: the median over seeds of the least held-out loss of tuned AdamW in a run of the same length. Medians over "
    "seeds (least to largest); ∞: not reached. Seconds are of training alone, inverses and compilation included."
)
UNTUNED = "kfac defaults"
_RATIOS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def report(folder: Folder, console: Console) -> None:
    """Write the tables and plots of a folder."""
    memory = read_memory(folder.path)
    tracks = {track: found for track in TITLES if (found := shown(folder, track))}
    sheets = [track_sheet(folder, track, found, memory) for track, found in tracks.items()]
    sheets += [settings_sheet([result for track in TITLES for result in results(folder, track)]), space_sheet()]
    (folder.path / "table.md").write_text("\n".join(sheet.markdown() for sheet in sheets))
    if tracks:
        _draw_profiles({track: times(found, track) for track, found in tracks.items()}, folder.path / "profile.png")
        _draw_curves(folder, tracks, folder.path / "curves.png")
    console.print(f"Tables and plots are in {folder.path}", highlight=False, soft_wrap=True)


def shown(folder: Folder, track: str) -> list[Result]:
    """The results of a track, ordered by workload; the tuned track with natgrad's defaults."""
    found = results(folder, track)
    if track == "tuned" and found:
        there = {result.workload for result in found}
        untuned = [result for result in results(folder, "defaults") if result.contestant == "kfac"]
        found += [result for result in untuned if result.workload in there]
    order = list(WORKLOADS)
    return sorted(found, key=lambda result: order.index(result.workload))


def name_of(result: Result, track: str) -> str:
    """The key of a result in a plot or table of a track."""
    return UNTUNED if track == "tuned" and result.track == "defaults" else result.contestant


def label_of(name: str) -> str:
    """What is shown for it."""
    return f"{CONTESTANTS['kfac'].label}, defaults" if name == UNTUNED else CONTESTANTS[name].label


def times(found: Sequence[Result], track: str) -> dict[str, dict[str, float]]:
    """Contestant → workload → median seconds to the target, of the workloads that have one."""
    by_name: dict[str, dict[str, float]] = {}
    for result in found:
        if result.seconds is not None:
            by_name.setdefault(name_of(result, track), {})[result.workload] = result.seconds.median
    return by_name


def track_sheet(
    folder: Folder, track: str, found: Sequence[Result], memory: dict[str, dict[str, float | None]]
) -> Sheet:
    """What each contestant took to each target."""
    header = ("workload", "optimizer", "steps", "seconds", "× AdamW", "least loss", "peak MB")
    lines: list[tuple[str, ...] | None] = []
    references = {r.workload: r for r in results(folder, REFERENCE[0]) if r.contestant == REFERENCE[1]}
    previous = ""
    for result in found:
        goal = target(folder, result.workload)
        own = memory.get(result.workload, {}).get(result.contestant)
        workload = "" if result.workload == previous else result.workload + ("" if goal is None else f" ≤ {goal:.4g}")
        previous = result.workload
        lines.append(
            (
                workload,
                label_of(name_of(result, track)),
                spread(result.steps, ",.0f"),
                spread(result.seconds, ".3g"),
                relative(result, references.get(result.workload)),
                spread(result.loss, ".4g"),
                "–" if own is None else f"{own / 1e6:,.0f}",
            )
        )
    return Sheet(TITLES[track], header, lines, [TARGET_NOTE], text_columns=2)


def settings_sheet(found: Sequence[Result]) -> Sheet:
    """With what each ran in the tuned track, and why some ended before their time in either."""
    lines: list[tuple[str, ...] | None] = []
    for result in found:
        settings = ", ".join(f"{key}={value}" for key, value in result.settings.items()) or "defaults"
        failures = "; ".join(result.failures)
        if result.track == "tuned" or failures:
            lines.append((result.workload, CONTESTANTS[result.contestant].label, settings, failures))
    header = ("workload", "optimizer", "settings", "ended early")
    return Sheet("Settings, and what went wrong", header, lines, text_columns=4)


def spread(values: Spread | None, form: str) -> str:
    """The median, and the range where there is one."""
    if values is None:
        return "–"
    median, low, high = ("∞" if math.isinf(value) else format(value, form) for value in values)
    return median if low == high else f"{median} ({low}–{high})"


def relative(result: Result, reference: Result | None) -> str:
    """The median time as a multiple of the reference's, to its target; a dash where one of them has none."""
    if result.seconds is None or reference is None or reference.seconds is None:
        return "–"
    if math.isinf(result.seconds.median) or not reference.seconds.median:
        return "–"
    return f"{result.seconds.median / reference.seconds.median:.2f}"


def space_sheet() -> Sheet:
    """The published tuning spaces."""
    lines: list[tuple[str, ...] | None] = []
    for contestant in CONTESTANTS.values():
        lines += [None] if lines else []
        space = {**contestant.space, "decay": DECAY}
        lines += [(contestant.label if i == 0 else "", k, str(v)) for i, (k, v) in enumerate(space.items())]
    note = (
        "One space for all workloads. Trial 0 is the defaults, the others are points of a scrambled Sobol sequence. "
        "decay: whether the rate falls linearly to zero over the run."
    )
    return Sheet("Tuning spaces", ("optimizer", "setting", "values"), lines, [note], text_columns=3)


def _draw_profiles(tracks: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    figure = new_figure(5.4 * len(tracks), 3.8, constrained=True)
    for axes, (track, own) in zip(figure.subplots(1, len(tracks), squeeze=False)[0], tracks.items(), strict=True):
        ratios = profile(own)
        count = len({workload for times_ in own.values() for workload in times_})
        last = 1.2 * max((ratio for values in ratios.values() for ratio in values), default=1.0)
        for name, values in ratios.items():
            x = [1.0, *values, last]
            y = [
                sum(v <= 1 for v in values) / count,
                *((i + 1) / count for i in range(len(values))),
                len(values) / count,
            ]
            axes.step(x, y, where="post", label=label_of(name), **_line(name))
        axes.set_xscale("log")
        axes.set_xticks([tick for tick in _RATIOS if tick <= last])
        axes.set_ylim(0, 1.02)
        finish(axes, TITLES[track], "time to target, as a multiple of the fastest's", "share of workloads")
        if ratios:
            axes.legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, path)


def _draw_curves(folder: Folder, tracks: dict[str, list[Result]], path: Path) -> None:
    workloads = list(dict.fromkeys(result.workload for found in tracks.values() for result in found))
    figure = new_figure(4.2 * len(tracks), 2.9 * len(workloads), constrained=True)
    grid = figure.subplots(len(workloads), len(tracks), squeeze=False)
    for row, workload in zip(grid, workloads, strict=True):
        for axes, (track, found) in zip(row, tracks.items(), strict=True):
            for result in found:
                if result.workload == workload:
                    _draw_curve(axes, folder, result, name_of(result, track))
            if (goal := target(folder, workload)) is not None:
                axes.axhline(goal, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
            axes.set_xscale("log")
            axes.set_yscale("log")
            finish(axes, f"{workload}, {track}", "training seconds", "held-out loss")
    if workloads:
        grid[0][0].legend(frameon=False, fontsize=7)
    save(figure, path)


def _draw_curve(axes: Axes, folder: Folder, result: Result, name: str) -> None:
    """Of the first seed."""
    outcome = runs(folder, result.track, result.workload, result.contestant)[0].outcome
    points = list(_points(outcome.seconds, outcome.values.get("loss", [])))
    if points:
        axes.plot(*zip(*points, strict=True), label=label_of(name), **_line(name))


def _points(seconds: Sequence[float], losses: Sequence[float | None]) -> Iterator[tuple[float, float]]:
    """Those that a logarithmic axis can show."""
    yield from ((s, loss) for s, loss in zip(seconds, losses, strict=True) if s > 0 and loss is not None and loss > 0)


def _line(name: str) -> dict[str, Any]:
    is_untuned = name == UNTUNED
    colour = COLOURS["kfac" if is_untuned else name]
    return {"color": colour, "linestyle": "--" if is_untuned else "-", "linewidth": 1.8 if "kfac" in name else 1.2}
