"""No room: said before the start where it can be seen, else in one line with what is needed; nothing that was good is lost."""

import contextlib
import errno
import os
import shutil
import stat
import subprocess

import pytest
from conftest import hashes
from forked import Child, command, limited, preload, unprivileged

from dsd_refine.errors import RunError, UsageError
from dsd_refine.files import is_full
from dsd_refine.run import disk as space
from dsd_refine.run.workspace import Workspace

STEPS = ("--gate", "none", "--batch-size", "8", "--device", "cpu", "--quiet", "--sparse-steps", "3", "--dense-steps", "3")
MODEL = ("model.safetensors", "dsd/predictions.parquet", "dsd/log.jsonl", "dsd/recipe.yaml")


@pytest.fixture(scope="module", autouse=True)
def imported():
    preload()


def pictures(made, out, *more):
    return (made / "timm", "--data", made / "pictures", "-o", out, *STEPS, "--save-every", "0", *more)


def ended(work, tmp_path):
    child = Child(work, tmp_path / "log")
    return child.wait(), child.said()


def same(one, two):
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in MODEL)


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    code, said = ended(command(*pictures(made, place / "out")), place)
    assert code == 0, said
    return place / "out"


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(bytes)` -> a directory with so much room, on a file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()

    def of(size):
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, check=False)
        if made.returncode:
            pytest.skip("mounting needs root")
        return place

    yield of
    subprocess.run(["umount", place], check=False)


def unchecked(work):
    """The same without the look before the start: room that is there then can be gone later."""

    def blind():
        space.check_room = lambda place, need: None
        work()

    return blind


def refuses_well(code, said, out, made, before):
    assert code == 5, said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
    assert "--resume" in said
    assert "MB" in said or "bytes" in said
    assert str(out.parent) in said
    assert not out.exists()
    assert hashes(made / "timm") == before


@pytest.mark.parametrize("kilobytes", [4, 700, 2_000, 5_000, 8_000])
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(made, undisturbed, small_disk, tmp_path, kilobytes):
    place, before = small_disk(f"{kilobytes}k"), hashes(made / "timm")
    code, said = ended(unchecked(command(*pictures(made, place / "out"))), tmp_path)
    refuses_well(code, said, place / "out", made, before)
    subprocess.run(["mount", "-o", "remount,size=100m", place], check=True)
    code, said = ended(command(*pictures(made, place / "out", "--resume")), tmp_path)
    assert code == 0, said
    same(place / "out", undisturbed)


def failing_sync(number, work, counted):
    """The same, where the n-th file that is synced finds no room, as some file systems only say then."""

    def starved():
        real, calls = os.fsync, iter(range(1, 10**6))

        def fsync(descriptor):
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                counted.write_text(str(call := next(calls)))
                if call == number:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        os.fsync = fsync
        work()

    return starved


@pytest.fixture(scope="module")
def syncs(made, tmp_path_factory):
    """How many files a whole run syncs."""
    place = tmp_path_factory.mktemp("syncs")
    code, said = ended(failing_sync(0, command(*pictures(made, place / "out")), place / "count"), place)
    assert code == 0, said
    return int((place / "count").read_text())


@pytest.mark.parametrize("share", [0, 0.25, 0.6, 0.85, 1])
def test_a_write_that_finds_no_room_when_it_is_synced(made, undisturbed, syncs, tmp_path, share):
    out, before = tmp_path / "out", hashes(made / "timm")
    number = 1 + round(share * (syncs - 1))
    code, said = ended(failing_sync(number, command(*pictures(made, out)), tmp_path / "count"), tmp_path)
    refuses_well(code, said, out, made, before)
    code, said = ended(command(*pictures(made, out, "--resume")), tmp_path)
    assert code == 0, said
    same(out, undisturbed)


@pytest.mark.parametrize("kilobytes", [1, 1_480, 5_000])
def test_a_limit_on_file_size(made, undisturbed, tmp_path, kilobytes):
    out, before = tmp_path / "out", hashes(made / "timm")
    args = pictures(made, out)
    code, said = ended(limited(command(*args), RLIMIT_FSIZE=kilobytes * 1000), tmp_path)
    if kilobytes >= 5_000:
        assert code == 0, said
    else:
        refuses_well(code, said, out, made, before)
        assert ended(command(*args, "--resume"), tmp_path)[0] == 0
    same(out, undisturbed)


def test_a_run_that_cannot_end_for_lack_of_room_is_not_begun(made, small_disk, tmp_path):
    place = small_disk("8m")
    code, said = ended(command(*pictures(made, place / "out")), tmp_path)
    assert code == 2, said
    assert "the run needs about" in said
    assert f"{place}/out.partial" in said
    assert "are free" in said
    assert not list(place.iterdir())


def test_what_is_looked_for_is_enough(made, undisturbed, small_disk, tmp_path):
    """The need that is named is not too little: on a disk of just that size the run ends well."""
    place = small_disk(needed(made, tmp_path / "out", tmp_path) + (64 << 10))
    code, said = ended(command(*pictures(made, place / "out", "--save-phases")), tmp_path)
    assert code == 0, said


def needed(made, out, tmp_path):
    """The bytes that a run asks for."""
    asked = tmp_path / "asked"

    def work():
        def ask(place, need):
            asked.write_text(str(need))
            raise UsageError("enough")

        space.check_room = ask
        command(*pictures(made, out, "--save-phases"))()

    ended(work, tmp_path)
    return int(asked.read_text())


def test_room_that_an_earlier_start_holds_counts(tmp_path, monkeypatch):
    (tmp_path / "state").write_bytes(bytes(1000))
    monkeypatch.setattr(space, "free_bytes", lambda place: 500)
    space.check_room(tmp_path, 1500)
    with pytest.raises(UsageError, match=r"needs about 1\.5 kB there, 500 bytes are free"):
        space.check_room(tmp_path, 1501)


def test_lack_of_room_is_seen_through_the_libraries_wrappings():
    full = OSError(errno.ENOSPC, "No space left on device")
    with contextlib.suppress(ValueError):
        try:
            raise full
        except OSError as error:
            raise ValueError("generation failed") from error
    assert is_full(full) is full
    assert is_full(OSError(errno.ENOENT, "")) is None
    wrapped = ValueError()
    wrapped.__cause__ = full
    assert is_full(wrapped) is full


def test_superseded_weights_are_removed_with_the_next_save(tmp_path):
    """However many epochs improve, OUT.partial holds one best of an arm and a few that wait."""
    import torch

    workspace = Workspace(tmp_path / "out", save_every=1e6)
    workspace.partial.mkdir()
    workspace.log_file.touch()
    most = 0
    for epoch in range(20):
        workspace.write_tensors(f"best-refined-0-{epoch}.safetensors", {"w": torch.zeros(3)})
        workspace.state["best"] = {"refined": {"0": {"file": f"best-refined-0-{epoch}.safetensors"}}}
        most = max(most, len(list(workspace.partial.glob("best-*"))))
        if workspace.save_due():
            workspace.save(None)
    assert most <= 1 + space.UNSAVED
    assert workspace.read_tensors("best-refined-0-19.safetensors")


# ---------------------------------------------------------------- places that cannot be written


def test_an_output_that_cannot_be_written(made, tmp_path):
    place = tmp_path / "theirs"
    place.mkdir(mode=0o555)
    os.chown(place, 65534, 65534)
    code, said = ended(unprivileged(command(*pictures(made, place / "out"))), tmp_path)
    assert code == 2, said
    assert said.strip() == f"Error: {place}/out.partial: cannot be written: Permission denied"


def test_a_read_only_disk(made, small_disk, tmp_path):
    place = small_disk("16m")
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    code, said = ended(command(*pictures(made, place / "out")), tmp_path)
    assert code == 2, said
    assert said.strip() == f"Error: {place}/out.partial: cannot be written: Read-only file system"


def test_data_and_a_source_of_someone_else_s_are_only_read(made, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(made, theirs)
    for path in (theirs, *theirs.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
        os.chown(path, 65534, 65534)
    code, said = ended(unprivileged(command(*pictures(theirs, tmp_path / "out"))), tmp_path)
    assert code == 0, said


def test_what_is_put_into_a_full_place_is_named(tmp_path):
    with pytest.raises(RunError, match="cannot write 4 bytes"):
        from dsd_refine.files import replace_bytes

        replace_bytes(tmp_path / "absent" / "file", b"data")
