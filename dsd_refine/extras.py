"""The optional packages: say which extra of this package has those that are missing."""

from __future__ import annotations

from importlib.util import find_spec

from dsd_refine.errors import UsageError


def require(what: str, extra: str, *packages: str) -> None:
    """Refuse what needs packages that are not installed, and name the extra that has them.

    Args:
        what: The task or the model that needs them, for the message.
        extra: The extra in pyproject.toml.
        packages: Their names, as they are imported.

    Raises:
        UsageError: A package is not installed.
    """
    missing = [name for name in packages if not is_installed(name)]
    if missing:
        raise UsageError(f"{what} needs {' and '.join(missing)}: pip install 'dsd-refine[{extra}]'")


def is_installed(package: str) -> bool:
    """Return whether a package can be imported. It is not imported."""
    return find_spec(package) is not None
