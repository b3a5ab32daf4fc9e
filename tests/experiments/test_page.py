"""The page of a run: what it holds, and that a browser shows it without an error and without network."""

import html
import io
import json
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from natgrad.experiments.experiment import start
from natgrad.experiments.page import write_page
from natgrad.experiments.runfolder import read_records
from natgrad.experiments.settings import Settings, SettingsError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
STEPS = 6
PICTURES = 2 * (1 + 6)  # of two contestants: the originals, and after 0, 1, 2, 3, 4 and 6 steps
# Two losses over two axes; eight charts of K-FAC: its step, and damping, condition and step of each layer; and the
# spectra of both factors of eight layers.
CHARTS = 4 + 8 + 16


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs, in folders named one and ``<i>two``, which a page must not take for a tag."""
    folder = tmp_path_factory.mktemp("runs")
    for optimizers, name in ((("adam", "kfac"), "one"), (("sgd",), "<i>two")):
        settings = Settings(optimizers=optimizers, width_divisor=32, images=48, steps=STEPS)
        start(settings, folder / name, Console(file=io.StringIO()))
    return folder / "one", folder / "<i>two"


@pytest.fixture(scope="module")
def page(runs):
    write_page(runs[0], [runs[1]], None, Console(file=io.StringIO()))
    return runs[0] / "report.html"


def charts(text):
    """The data of every chart, by its label."""
    labels = re.findall(r'<figure class="chart" tabindex="0" aria-label="(.*?)"', text)
    data = [json.loads(one) for one in re.findall(r'<script type="application/json">(.*?)</script>', text)]
    return dict(zip(labels, data, strict=True))


def test_the_page_is_small_and_holds_everything_itself(page):
    text = page.read_text()
    assert page.stat().st_size < 400_000  # of two megabytes at most; a long run has more points and pictures
    assert not re.findall(r'(?:src|href)="(?!data:)|url\(|@import|https?:', text)
    assert text.count("data:image/png;base64,") == PICTURES
    assert "<i>two" not in text
    assert "&lt;i&gt;two: SGD" in text


def test_the_charts_show_what_was_measured(page, runs):
    found = charts(page.read_text())
    assert len(found) == CHARTS
    records = {name: [r for r in read_records(runs[0]) if r.optimizer == name] for name in ("adam", "kfac")}
    test, seconds = found["Test loss over steps"], found["Training loss over training seconds"]
    assert test["names"] == ["one: Adam", "one: natgrad.KFAC", "<i>two: SGD"]
    kfac = test["lines"][1]
    assert [point[2] for point in kfac] == [str(step) for step in range(STEPS)]
    assert [float(point[3]) for point in kfac] == pytest.approx([r.test_loss for r in records["kfac"]], rel=1e-3)
    adam = seconds["lines"][0]
    assert [float(p[2]) for p in adam] == pytest.approx([r.seconds for r in records["adam"]], rel=1e-3, abs=1e-9)
    damping = found["Damping of A over steps"]
    assert damping["names"] == [f"layer {2 * i}" for i in range(8)]
    first = records["kfac"][0].diagnostics
    assert [float(line[0][3]) for line in damping["lines"]] == pytest.approx(
        [first[f"damping_a/{2 * i}"] for i in range(8)], rel=1e-3
    )
    spectrum = found["Eigenvalues of G, layer 14 over steps"]
    assert spectrum["names"] == ["largest", "top tenth from", "median", "damping"]  # the rest is zero with 48 images
    sampled = [r for r in records["kfac"] if "eigenvalue_g@0.5/14" in r.diagnostics]
    assert [r.step for r in sampled] == [0, 1, 2, 3, 4]  # as often as the pictures
    median = [float(point[3]) for point in spectrum["lines"][2]]
    assert median == pytest.approx([r.diagnostics["eigenvalue_g@0.5/14"] for r in sampled], rel=5e-3)  # to three digits


def test_the_tables_are_those_of_the_other_commands(page):
    text = page.read_text()
    for part in ("Summary", "best test loss", ">&lt;i&gt;two: SGD</td>", "How it was made"):
        assert part in text


def test_a_run_that_is_older_than_pictures_and_numbers_of_layers_has_a_page_too(runs, tmp_path, console):
    shutil.copytree(runs[0], tmp_path / "old", ignore=shutil.ignore_patterns("digits", "report.html"))
    lines = (tmp_path / "old/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record["diagnostics"] = {k: v for k, v in record["diagnostics"].items() if "/" not in k}
    (tmp_path / "old/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_page(tmp_path / "old", [], None, console)
    text = (tmp_path / "old/report.html").read_text()
    assert len(charts(text)) == 4 + 2
    assert "Reconstructions" not in text


def test_interrupted_before_the_first_record(runs, tmp_path, console):
    shutil.copytree(runs[0], tmp_path / "empty")
    (tmp_path / "empty/metrics.jsonl").write_text("")
    write_page(tmp_path / "empty", [], None, console)
    assert charts((tmp_path / "empty/report.html").read_text()) == {}


def test_the_articles_problem_shows_the_curves_of_2017(runs, tmp_path, console):
    shutil.copytree(runs[0], tmp_path / "full")
    config = json.loads((tmp_path / "full/config.json").read_text())
    (tmp_path / "full/config.json").write_text(json.dumps({**config, "width_divisor": 1, "images": 10_000}))
    write_page(tmp_path / "full", [], None, console)
    found = charts((tmp_path / "full/report.html").read_text())
    assert "Adam, 2017" in found["Test loss over steps"]["names"]
    assert "Adam, 2017" not in found["Test loss over training seconds"]["names"]


def test_a_folder_without_a_run_is_refused(runs, tmp_path, console):
    with pytest.raises(SettingsError, match="holds no run"):
        write_page(runs[0], [tmp_path], None, console)


# Points at the first chart, walks through the second by keyboard, and writes down what it sees.
PROBE = """
<script>
const [first, second] = document.querySelectorAll("figure.chart");
const plot = first.querySelector(".plot");
const box = plot.getBoundingClientRect();
const seen = { charts: 0, pictures: 0, tips: [], width: document.documentElement.scrollWidth, inner: innerWidth };
for (const chart of document.querySelectorAll("figure.chart")) {
  const lines = [...chart.querySelectorAll("polyline")].map((line) => line.getBoundingClientRect());
  seen.charts += lines.length > 0 && lines.every((line) => line.width > 50);
}
for (const image of document.images) seen.pictures += image.complete && image.naturalWidth === 280;
const look = () => {
  const rows = document.querySelectorAll("#tip tr");
  seen.tips.push([...rows].map((row) => [...row.cells].slice(1).map((cell) => cell.textContent)));
};
plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left, clientY: box.top }));
look();
plot.dispatchEvent(new PointerEvent("pointerleave"));
seen.hidden = document.getElementById("tip").hidden;
for (const key of ["ArrowRight", "ArrowRight"]) second.dispatchEvent(new KeyboardEvent("keydown", { key }));
seen.marks = second.querySelectorAll(".mark").length;
seen.resources = performance.getEntriesByType("resource").map((one) => one.name);
document.body.append(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) }));
</script>
"""


def browse(text, folder):
    """Let the browser show a page; returns (what `PROBE` saw, what the console said)."""
    (folder / "probed.html").write_text(text.replace("</body>", PROBE + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--window-size=1200,900", (folder / "probed.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    (seen,) = re.findall(r'<pre id="seen">(.*?)</pre>', shown.stdout) or ["null"]
    return json.loads(html.unescape(seen)), [line for line in shown.stderr.splitlines() if ":CONSOLE:" in line]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_a_browser_shows_it_without_an_error(page, runs, tmp_path):
    seen, console = browse(page.read_text(), tmp_path)
    assert console == []
    assert seen["charts"] == CHARTS
    assert seen["pictures"] == PICTURES
    first = {r.optimizer: r for run in runs for r in reversed(read_records(run))}
    losses = [f"{first[name].test_loss:.4g}" for name in ("adam", "kfac", "sgd")]
    assert seen["tips"] == [
        [
            ["", "Test loss", "steps"],
            ["one: Adam", losses[0], "0"],
            ["one: natgrad.KFAC", losses[1], "0"],
            ["<i>two: SGD", losses[2], "0"],
        ]
    ]
    assert seen["hidden"] is True
    assert seen["marks"] == 3
    assert seen["resources"] == []
    assert seen["width"] <= seen["inner"]  # nothing sticks out to the right


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_the_browser_would_tell_of_an_error(page, tmp_path):
    _, console = browse(page.read_text().replace('"use strict";', '"use strict"; undefined_name;', 1), tmp_path)
    assert any("undefined_name is not defined" in line for line in console)
