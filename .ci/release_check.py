"""What must hold before a release: `make release-check`.

The working tree is clean, version, CHANGELOG.md and tag agree, wheel and sdist are accepted by twine, and a bare
environment that takes everything from the index refines the demo. What needs the index is left out, and said,
where the index cannot be reached.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHORT = ("--sparse-steps", "1", "--dense-steps", "1", "--control", "none", "--gate", "none", "--device", "cpu")


def version_of(root: Path) -> str:
    """Return `__version__` of the checkout, without importing it."""
    for node in ast.parse((root / "dsd_refine/__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise SystemExit("dsd_refine/__init__.py: has no __version__")


def faults(root: Path) -> list[str]:
    """Return what is wrong with the checkout, one line each; an empty list if it can be released."""
    version = version_of(root)
    changed = _git(root, "status", "--porcelain").splitlines()
    found = [f"the working tree has changes: {', '.join(line[3:] for line in changed)}"] if changed else []
    return [*found, *_faults_of_changelog((root / "CHANGELOG.md").read_text("utf-8"), version), *_faults_of_tag(root, version)]


def _faults_of_changelog(text: str, version: str) -> Iterator[str]:
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    if sections.pop("Unreleased", "").strip():
        yield f"CHANGELOG.md: has entries under Unreleased; move them under {version}"
    first = next(iter(sections), "missing")
    if first.split()[0] != version or "unreleased" in first.lower():
        yield f"CHANGELOG.md: its first release is {first!r}; {version} with its date is expected"


def _faults_of_tag(root: Path, version: str) -> Iterator[str]:
    if not _git(root, "tag", "--list", f"v{version}"):
        yield f"there is no tag v{version}: git tag v{version}"
    elif _git(root, "rev-list", "-n", "1", f"v{version}") != _git(root, "rev-parse", "HEAD"):
        yield f"the tag v{version} is another commit: raise the version, or check out the tag"


def _git(root: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", root, *args], capture_output=True, text=True, check=True).stdout.rstrip("\n")


def build(root: Path, place: Path) -> list[Path]:
    """Build wheel and sdist; returns their files."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", place], cwd=root, check=True)
    return sorted(place.iterdir())


def environment(place: Path) -> Path:
    """Make a bare environment; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    return place / "bin/python"


def install(python: Path, *wishes: str) -> bool:
    """Install from the index; returns whether it could be done."""
    return subprocess.run([python, "-m", "pip", "install", "--quiet", *wishes]).returncode == 0


def try_out(python: Path, out: Path) -> None:
    """Refine the demo with the installed package, and verify the result."""
    command = python.with_name("dsd-refine")
    (demo,) = python.parent.parent.glob("lib/python*/site-packages/dsd_refine/recipes/demo/checkpoint")
    refine = ("run", demo, "--recipe", "digits", "--output-dir", out, *SHORT)
    for arguments in (("recipes",), refine, ("verify", demo, out)):
        subprocess.run([command, *arguments], cwd=out.parent, check=True, stdout=subprocess.DEVNULL)


def check_archives(wheel: Path, sdist: Path, place: Path) -> list[str]:
    """Let twine look at wheel and sdist, and use both; returns what was left out, one line each."""
    left_out = []
    tools, bare = environment(place / "tools"), environment(place / "bare")
    if install(tools, "twine"):
        subprocess.run([tools, "-m", "twine", "check", "--strict", wheel, sdist], check=True)
    else:
        left_out.append("twine cannot be installed, so it has not looked at wheel and sdist")
    if install(bare, f"{wheel}[timm]"):
        try_out(bare, place / "of-wheel")
        install(bare, "--force-reinstall", "--no-deps", str(sdist))
        try_out(bare, place / "of-sdist")
    else:
        left_out.append("the wheel cannot be installed with what it needs: is the index reachable?")
    return left_out


def main() -> int:
    """Check all; returns the exit code."""
    found = faults(ROOT)
    with tempfile.TemporaryDirectory(prefix="dsd-release-") as folder:
        archives = build(ROOT, Path(folder) / "dist")
        (wheel,) = (path for path in archives if path.suffix == ".whl")
        (sdist,) = (path for path in archives if path.suffix == ".gz")
        left_out = check_archives(wheel, sdist, Path(folder))
    for line in (*(f"fault: {fault}" for fault in found), *(f"left out: {line}" for line in left_out)):
        print(line, file=sys.stderr)
    print(f"dsd-refine {version_of(ROOT)}: {'not ready' if found or left_out else 'ready'}")
    return 1 if found or left_out else 0


if __name__ == "__main__":
    sys.exit(main())
