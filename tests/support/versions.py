"""The versions that are installed, and those that are tested."""

import re
from importlib.metadata import version
from pathlib import Path

CONSTRAINTS = Path(__file__).parent.parent.parent / "constraints.txt"


def are_tested(*names):
    """Whether packages have the versions of constraints.txt. `make test-lowest` has others, which lack some models."""
    pins = dict(re.findall(r"^(\S+)==(\S+)$", CONSTRAINTS.read_text("utf-8"), re.MULTILINE))
    return all(version(name) == pins[name] for name in names)
