"""`make release-check`: what it finds wrong with a checkout."""

import importlib.util
import subprocess

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("release_check", ROOT / ".ci/release_check.py")
release_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release_check)

CHANGES = "# Changelog\n\n## 1.2.0 (2026-11-28)\n\n- new\n\n## 1.1.0 (2026-01-01)\n\n- old\n"


@pytest.fixture
def checkout(tmp_path):
    """A checkout that can be released: version, changes and tag agree."""
    (tmp_path / "dsd_refine").mkdir()
    (tmp_path / "dsd_refine/__init__.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGES)
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    git(tmp_path, "tag", "v1.2.0")
    return tmp_path


def git(checkout, *args):
    who = ("-c", "user.name=someone", "-c", "user.email=someone@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *args], cwd=checkout, check=True)


def commit(checkout):
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "--message", "all")


def test_a_checkout_that_agrees_has_no_faults(checkout):
    assert release_check.faults(checkout) == []


def test_a_change_that_is_not_committed_is_a_fault(checkout):
    (checkout / "new.txt").touch()
    assert release_check.faults(checkout) == ["the working tree has changes: new.txt"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            CHANGES.replace("1.2.0", "1.3.0"),
            "CHANGELOG.md: its first release is '1.3.0 (2026-11-28)'; 1.2.0 with its date is expected",
        ),
        (CHANGES.replace("2026-11-28", "unreleased"), "CHANGELOG.md: its first release is '1.2.0 (unreleased)'"),
        (CHANGES.replace("## 1.2.0", "## Unreleased\n\n- more\n\n## 1.2.0"), "CHANGELOG.md: has entries under Unreleased"),
        ("# Changelog\n", "CHANGELOG.md: its first release is 'missing'"),
    ],
)
def test_changes_that_are_not_of_this_version_are_a_fault(checkout, changes, says):
    (checkout / "CHANGELOG.md").write_text(changes)
    commit(checkout)
    git(checkout, "tag", "--force", "v1.2.0")
    (fault,) = release_check.faults(checkout)
    assert fault.startswith(says)


def test_a_tag_that_is_missing_or_of_another_commit_is_a_fault(checkout):
    (checkout / "new.txt").touch()
    commit(checkout)
    assert release_check.faults(checkout) == ["the tag v1.2.0 is another commit: raise the version, or check out the tag"]
    git(checkout, "tag", "--delete", "v1.2.0")
    assert release_check.faults(checkout) == ["there is no tag v1.2.0: git tag v1.2.0"]


def test_the_version_is_that_of_the_package():
    from dsd_refine import __version__

    assert release_check.version_of(ROOT) == __version__
