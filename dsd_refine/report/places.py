"""Places of this machine in what is published: nobody else needs them, and they tell who ran it where."""

from __future__ import annotations

import os
import re
from pathlib import Path


def from_home(text: str) -> str:
    """The home directory as `~`; else the text as it was given."""
    home = os.path.expanduser("~")
    return text if home in ("/", "~") else re.sub(rf"(?<![\w.~/-]){re.escape(home)}(?=/|$)", "~", text)


def last_part(text: str) -> str:
    """A full path by its last part, also behind `--option=`; else the text as it was given."""
    option, equals, place = text.rpartition("=")
    return f"{option}{equals}{Path(place).name or place}" if Path(place).is_absolute() else text
