"""Remove this machine's paths from published text: they would reveal the user and the machine."""

from __future__ import annotations

import os
import re
from pathlib import Path


def from_home(text: str) -> str:
    """Return the text with `~` in place of the home directory."""
    home = os.path.expanduser("~")
    return text if home in ("/", "~") else re.sub(rf"(?<![\w.~/-]){re.escape(home)}(?=/|$)", "~", text)


def last_part(text: str) -> str:
    """Return the last part of an absolute path, also after `--option=`. Other text stays unchanged."""
    option, equals, path = text.rpartition("=")
    return f"{option}{equals}{Path(path).name or path}" if Path(path).is_absolute() else text
