"""Links in a folder from a stranger: what they lead to is copied only where it is the folder's own."""

from __future__ import annotations

import os
from pathlib import Path


def leads_out(path: Path, folder: Path) -> bool:
    """Is the path, or a folder on the way to it, a link to something that is not the folder's own?

    Its own is what lies in it, and for a snapshot in the Hub's cache also the cache's blobs, which its files link to.
    """
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return not any(os.path.commonpath([real, own]) == own for own in (root, *_blobs(root)))


def _blobs(root: str) -> list[str]:
    """`…/blobs` of `…/snapshots/COMMIT`."""
    place, _ = os.path.split(root)
    above, name = os.path.split(place)
    return [os.path.join(above, "blobs")] if name == "snapshots" else []
