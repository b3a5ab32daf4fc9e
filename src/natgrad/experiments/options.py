"""What the commands share: lists of names as options, and refusals."""

import typer


def split(names: str | None) -> tuple[str, ...] | None:
    """A comma-separated option as names; None where it was not given."""
    return None if names is None else tuple(name.strip() for name in names.split(","))


def refusal(error: Exception) -> typer.Exit:
    """Say in one line what the user can mend; the exit to raise."""
    typer.echo(f"natgrad: {error}", err=True)
    return typer.Exit(2)
