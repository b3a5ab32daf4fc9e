"""The named experiments: what ``natgrad`` runs on the command line.

- `mnist`, `download`: the data, 20,000 images shipped with the package, the full set on demand.
- `settings`, `autoencoder`: what one run is, and the article's network, loss and batches.
- `contestants`: the registry of optimizers, and one optimizer at work on its own copy of the network.
- `race`: who takes the next step, so that the machine's noise hits all alike.
- `runfolder`, `curves`: what a run writes, and reading it back (with the curves recorded in 2017).
- `samples`: what is recorded at some steps only: numbers of each layer, pictures.
- `progress`, `thresholds`, `table`, `plot`: what is shown, while it runs and after.
- `charts`, `internals`, `spectra`, `colours`, `page`: the same and more as a page for the browser, with the template
  `html/`.
- `experiment`, `compare`, `demo`: the three of them put together, one function each; `natgrad.cli` calls them.
- `newton`, `newton_plot`: the derivation, checked by numbers.
- `figures`, `options`: what all plots share, and all commands.
- `doctor`: whether this machine is set up to be fast.
- `bench`: the benchmark suite.

Everything here needs the extra ``natgrad[experiments]``; the library itself needs torch alone.
"""

from importlib.util import find_spec

# Package by module.
_EXTRA = {"PIL": "pillow", **{name: name for name in ("jinja2", "matplotlib", "numpy", "pooch", "rich", "typer")}}


def require_extra() -> None:
    """Say how to install what the experiments need, before an import fails somewhere deep.

    Raises:
        ModuleNotFoundError: A package of the extra ``experiments`` is missing.
    """
    missing = [package for module, package in _EXTRA.items() if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"natgrad's experiments and command line need {', '.join(missing)}. "
            "Install them with: pip install 'natgrad[experiments]'",
            name=missing[0],
        )


require_extra()
