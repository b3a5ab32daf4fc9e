"""Data that are fetched on first use: one checked file at a time, cached.

The cache is the user's cache folder for natgrad, or the folder that the environment variable ``NATGRAD_DATA`` names; a
file put there by hand is taken as it is, once its checksum agrees.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import pooch  # type: ignore[import-untyped]


class DownloadError(OSError):
    """A file could not be fetched; the message says what to do instead."""


def cache_folder() -> Path:
    """Where `fetch` keeps its files."""
    return Path(os.environ.get("NATGRAD_DATA") or pooch.os_cache("natgrad"))


def fetch(name: str, mirrors: Sequence[str], checksum: str, without: str) -> Path:
    """The local path of one checked file, from the cache or the first mirror that has it.

    Args:
        name: Of the file in the cache.
        mirrors: Its addresses, tried in this order.
        checksum: ``"md5:…"`` or ``"sha256:…"``.
        without: What still works without the file, for the error message.

    Raises:
        DownloadError: The file is neither cached nor to be had from any mirror.
    """
    failures = []
    for address in mirrors:
        try:
            return Path(pooch.retrieve(address, known_hash=checksum, fname=name, path=cache_folder()))
        # No network and no permission are both OSErrors (those of `requests` too); a wrong checksum is a ValueError.
        except (OSError, ValueError) as error:
            failures.append(f"  {address}: {type(error).__name__}: {error}")
    raise DownloadError(
        f"natgrad could not fetch {name}. Tried:\n" + "\n".join(failures) + "\n"
        f"To provide it by hand, copy the file ({checksum.replace(':', ' ')}) to\n"
        f"  {cache_folder() / name}\n"
        f"or set NATGRAD_DATA to a folder that has it. {without}"
    )
