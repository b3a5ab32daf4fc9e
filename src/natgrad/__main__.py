"""``python -m natgrad`` and the console command ``natgrad``."""

import sys


def main() -> None:
    """Run the command line, or say in one line which extra it needs."""
    try:
        # Imported here to turn a missing extra into a message instead of a traceback.
        from natgrad.cli import app
    except ModuleNotFoundError as error:
        if "natgrad[experiments]" not in str(error):
            raise
        sys.exit(f"natgrad: {error}")
    app()


if __name__ == "__main__":
    main()
