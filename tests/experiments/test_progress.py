import io

from rich.console import Console

from natgrad.experiments.contestants import Record
from natgrad.experiments.progress import Progress

FIRST = Record("adam", 0, 97.5, 97.6, 0.0)
SECOND = Record("kfac", 4, 20.25, None, 12.5, {"damping_a": 0.02, "damping_g": 0.003, "lr": 0.1})


def test_plain_lines_without_a_terminal(tiny, console):
    with Progress(console, ("adam", "kfac"), tiny(steps=6)) as progress:
        for record in (FIRST, FIRST, SECOND):
            progress.show(record)
        printed = console.file.getvalue()
    lines = printed.splitlines()
    assert len(lines) == 2  # The second record came too soon after the first.
    assert "\x1b" not in printed
    assert " ".join(lines[0].split()) == "Adam steps 1 / 6 train 97.500 test 97.600 0.0 s"
    expected = "natgrad.KFAC steps 5 / 6 train 20.250 test – 12.5 s damping A, G: 0.02 0.003"
    assert " ".join(lines[1].split()) == expected


def test_the_last_record_is_always_printed_and_only_once(tiny, console):
    with Progress(console, ("adam", "kfac"), tiny()) as progress:
        progress.show(FIRST)
        progress.show(Record("adam", 1, 55.0, 55.0, 1.0))
        progress.show(SECOND)
    lines = console.file.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["1", "5", "2"]


def test_a_table_on_a_terminal(tiny):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(terminal, ("adam", "kfac"), tiny(seconds=30)) as progress:
        progress.show(FIRST)
        progress.show(SECOND)
    shown = terminal.file.getvalue()
    assert "waiting" in shown  # K-FAC, when Adam's first record was shown.
    for text in ("natgrad.KFAC", "20.250", "12.5 / 30", "0.02 0.003"):
        assert text in shown


def test_divergence_is_said(tiny, console):
    with Progress(console, ("adam",), tiny()) as progress:
        progress.show(Record("adam", 3, None, None, 1.0))
    assert "diverged" in console.file.getvalue()
