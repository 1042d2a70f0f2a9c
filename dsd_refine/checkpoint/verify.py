"""Verify an output: compare its files with the source's, and its model's outputs with the evaluated
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import load_file, save

from dsd_refine.checkpoint.copies import may_be_weights
from dsd_refine.checkpoint.layout import Layout, read_layout
from dsd_refine.checkpoint.parts import loaded_by_parts
from dsd_refine.checkpoint.placement import gather
from dsd_refine.checkpoint.safetensors_file import LONGEST_NAME, TRAINABLE, all_finite, memory, read_json
from dsd_refine.errors import CheckpointError
from dsd_refine.files import hashing, sha256_file, sha256_files
from dsd_refine.forward import logits_of

if TYPE_CHECKING:
    from dsd_refine.checkpoint.checkpoint import Checkpoint

T = TypeVar("T")
PROBE = "dsd/probe.safetensors"
LONGEST_PATH = 1000  # characters of a file's name in the report: systems allow a few thousand bytes with the folder

# Other kernels may compute the outputs (channels-last, threads, another machine), so float32 noise
# is allowed.
RELATIVE, ABSOLUTE = 1e-3, 1e-4
OF_HALF = 0.05  # of the largest output, where a sharded run computed the outputs in bfloat16


def weights_folder(output: Path) -> Path:
    """Return the folder of an output's checkpoint: the output, or `rejected/` if the gate was not
    met.
    """
    return output / "rejected" if (output / "rejected").is_dir() else output


def verify(checkpoint: Checkpoint, output: Path, *, computes: bool = True) -> list[str]:
    """Return everything that is wrong with an output of `checkpoint`: one text each, empty if all
    is right.

    It checks the headers of the weight files (names, shapes, dtypes, order, metadata) and the shard
    map. It checks every tensor that the model does not use, every side file, and the report's
    hashes of source and output. Then the library loads the output, and the model's outputs on the
    run's examples are compared with the saved ones. A config or code that differs from the source's
    is not loaded.

    Args:
        checkpoint: The source. `open_shapes` is enough.
        output: The output's folder.
        computes: Compare outputs on the examples. Else compare the values that the library loads, in the dtype of the files,
            with those in the files: this takes no memory, where the model is too large for one process.
    """
    folder = weights_folder(output)
    try:
        written = read_layout(folder)
    except CheckpointError as error:
        return [str(error)]
    problems = [*_headers(checkpoint.layout, written)]
    if problems:
        return problems
    weights = {file.name for file in checkpoint.layout.files}
    with hashing(_paths(checkpoint, folder, weights)) as of_weights:  # the other cores hash while this one compares
        hashed = sha256_files(_paths(checkpoint, folder, set(checkpoint.counted) - weights))
        problems += _tensors(checkpoint, written)
        side_problems = [*_side_files(checkpoint, folder, hashed)]
        try:
            compared = _outputs(checkpoint, output, folder) if computes else _values(checkpoint, written, folder)
            differing = [] if side_problems else [*compared]
        except CheckpointError as error:
            differing = [f"its own library does not load it: {error}"]
        hashed |= of_weights()
    return [*problems, *side_problems, *_hashes(checkpoint, output, folder, hashed), *differing]


def _headers(source: Layout, written: Layout) -> Iterator[str]:
    """Compare the names and the headers of the weight files."""
    if [file.name for file in source.files] != [file.name for file in written.files]:
        yield f"weight files are {[f.name for f in written.files]}, the source's are {[f.name for f in source.files]}"
        return
    for ours, theirs in zip(written.files, source.files, strict=True):
        if ours.head != theirs.head:
            yield f"{ours.name}: header (names, shapes, dtypes, order, metadata) differs from the source's"


def _tensors(checkpoint: Checkpoint, written: Layout) -> Iterator[str]:
    """Check that unused tensors have the source's bytes, and that trained ones are finite."""
    for file, theirs in zip(written.files, checkpoint.layout.files, strict=True):
        tensors, source = file.mapped(), theirs.mapped()
        for name, tensor in tensors.items():
            if name not in checkpoint.placement and memory(tensor) != memory(source[name]):
                yield f"{name}: is not the model's, yet its bytes differ from the source's"
            if name in checkpoint.placement and tensor.dtype in TRAINABLE and not all_finite(tensor):
                yield f"{name}: holds values that are not finite"


def _paths(checkpoint: Checkpoint, folder: Path, names: set[str]) -> list[Path]:
    """The counted files of these names, of the output and of the source, that exist."""
    paths = [root / name for name in checkpoint.counted if name in names for root in (folder, checkpoint.source.folder)]
    return [path for path in paths if path.is_file()]


def _side_files(checkpoint: Checkpoint, folder: Path, hashed: dict[Path, str]) -> Iterator[str]:
    """Check that the index and every side file are byte-equal to the source's."""
    index = [checkpoint.layout.index.name] if checkpoint.layout.index else []
    for name in [*index, *checkpoint.side_files]:
        if not (folder / name).is_file():
            yield f"{name}: the source has it, the output does not"
        elif hashed[folder / name] != hashed[checkpoint.source.folder / name]:
            yield f"{name}: differs from the source's"


def _hashes(checkpoint: Checkpoint, output: Path, folder: Path, hashed: dict[Path, str]) -> Iterator[str]:
    """Compare the files of the source and of the output with the hashes in the report."""
    if not (output / "dsd/report.json").is_file():
        yield "dsd/report.json is missing: nothing says what was written"
        return
    try:
        report: dict[str, Any] = read_json(output / "dsd/report.json")
        files = {side: {str(item["name"]): item["sha256"] for item in report[side]["files"]} for side in ("output", "source")}
    except (CheckpointError, KeyError, TypeError) as error:
        yield f"dsd/report.json is not a report with the hashes of output and source ({error!s:.200})"
        return
    reported, key = report["source"].get("weights_key"), checkpoint.layout.weights_key
    if reported != key and "weights_key" in report["source"]:
        yield f"the report's source are the weights under {reported!r} of its pickle, looked at were those under {key!r}"
    yield from _unlisted(checkpoint, folder, set(files["output"]))
    for side, root in (("output", folder), ("source", checkpoint.source.folder)):
        for name, digest in files[side].items():
            path = root / name
            if not _inside(name) or not path.is_file() or (hashed.get(path) or sha256_file(path)) != digest:
                yield f"{name!s:.200}: SHA-256 of the {side}'s file is not the one in the report"


def _unlisted(checkpoint: Checkpoint, folder: Path, listed: set[str]) -> Iterator[str]:
    """Find files of the output that the report does not list."""
    expected = {*checkpoint.counted}
    if not checkpoint.layout.from_pickle:
        for name in sorted(expected - listed):
            yield f"{name}: the report does not list it among the output's files"
    for path in sorted(folder.iterdir()):
        if path.is_file() and may_be_weights(path.name) and path.name not in listed:
            yield f"{path.name}: holds weights that the run did not write"


def _inside(name: str) -> bool:
    """True if a name from a report stays inside its folder and is short enough for a file."""
    parts = Path(name).parts
    short = len(name) <= LONGEST_PATH and all(len(part.encode(errors="replace")) <= LONGEST_NAME for part in parts)
    return short and "\0" not in name and ".." not in parts and not Path(name).is_absolute()


def save_probe(path: Path, probes: Sequence[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> None:
    """Save a few examples for `verify`: the inputs of each, as one batch, and the model's outputs."""
    tensors: dict[str, torch.Tensor] = {}
    for number, (inputs, outputs) in enumerate(probes):
        tensors |= {f"{number}.input.{name}": value.cpu().contiguous() for name, value in inputs.items()}
        tensors[f"{number}.output"] = outputs.cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(tensors))


def load_probe(path: Path) -> dict[str, tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Read what `save_probe` wrote: the inputs and outputs of each example, by its number.

    A broken file raises safetensors' own errors.
    """
    tensors = load_file(path)
    numbers = [number for number, _, kind in (name.partition(".") for name in tensors) if kind == "output"]

    def inputs(number: str) -> dict[str, torch.Tensor]:
        start = f"{number}.input."
        return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}

    return {number: (inputs(number), tensors[f"{number}.output"]) for number in numbers}


def _outputs(checkpoint: Checkpoint, output: Path, folder: Path) -> Iterator[str]:
    """Load the output by its library, and compare its outputs on the saved examples."""
    if not (output / PROBE).is_file():
        yield f"{PROBE} is missing: the outputs cannot be compared"
        return
    try:
        probes = load_probe(output / PROBE)
    except Exception as error:  # safetensors has its own errors for a broken file
        yield f"{PROBE} cannot be read: {error!s:.200}"
        return
    if not probes:
        yield f"{PROBE} holds no example: the outputs cannot be compared"
    model = checkpoint.library.load_plain(folder).eval()
    for number, (inputs, expected) in probes.items():
        try:
            with torch.no_grad():
                logits = logits_of(model, inputs)
        except Exception as error:  # inputs that do not fit may raise any error
            yield f"example {number}: the model cannot compute on its inputs ({' '.join(str(error).split())[:200]})"
            continue
        if not _near(logits, expected):
            yield f"example {number}: the model as loaded from the output computes something else than was evaluated"


def _values(checkpoint: Checkpoint, written: Layout, folder: Path) -> Iterator[str]:
    """Load the output by its library in the dtype of the files, and compare the model's values with those in the files."""
    tensors, equal = written.mapped(), set()
    for state in _plain_states(checkpoint, written, folder):
        for name, slices in checkpoint.placement.items():
            if all(each.key in state for each in slices):
                found = gather(slices, tensors[name], state).to(tensors[name].dtype)
                equal |= {name} if torch.equal(found, tensors[name]) else set()
    for name in checkpoint.placement:
        if name not in equal:
            yield f"{name}: the model as loaded from the output has other values than the file"


def _plain_states(checkpoint: Checkpoint, layout: Layout, folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the model's tensors as its library loads them from a folder in the dtype of the files: all at once, or block by
    block where the library puts them into another form, which takes memory.
    """
    library, dtype = checkpoint.library, layout.main_dtype
    if not checkpoint.moved:
        yield library.load_plain(folder, dtype).eval().state_dict()
        return
    tensors = layout.mapped()
    yield from loaded_by_parts(
        lambda given: library.load(given, dtype), tensors, tensors, lambda part: {name: tensors[name] for name in part}
    )


def _near(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    if expected.dtype == torch.bfloat16:
        expected = expected.float()
        return logits.shape == expected.shape and bool((logits - expected).abs().max() <= OF_HALF * expected.abs().max())
    return logits.shape == expected.shape and torch.allclose(logits, expected, rtol=RELATIVE, atol=ABSOLUTE)


def check_plain(checkpoint: Checkpoint, probes: Sequence[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> None:
    """Check before training that the source, loaded as a user would load it, has the same outputs
    as our model.

    The output will have the source's side files, so a source that its library cannot load would
    give an output that it cannot load. A pickle source is not checked, because its output has
    another format.

    Args:
        checkpoint: The opened source.
        probes: Examples: the inputs, and the outputs of `checkpoint.model`.

    Raises:
        CheckpointError: The library cannot load the source from its folder, or its outputs differ.
    """
    if checkpoint.layout.from_pickle:
        return
    with _alone(checkpoint) as folder:
        model = _by_its_library(checkpoint, folder, lambda: checkpoint.library.load_plain(folder, torch.float32).eval())
        for inputs, expected in probes:
            with torch.no_grad():
                logits = logits_of(model, inputs)
            if not _near(logits, expected.cpu().float()):
                raise _other_model(checkpoint, "computes something else than these weights do")


def check_plain_values(checkpoint: Checkpoint) -> None:
    """Check before training what `check_plain` does, by values in the dtype of the files. This takes no memory.

    Raises:
        CheckpointError: The library cannot load the source from its folder, or loads other values.
    """
    if checkpoint.layout.from_pickle:
        return
    with _alone(checkpoint) as folder:
        expected = checkpoint.values or checkpoint.model.state_dict()
        left, states = set(expected), _plain_states(checkpoint, checkpoint.layout, folder)
        while state := _by_its_library(checkpoint, folder, lambda: next(states, None)):
            for key in left & set(state):
                if not torch.equal(state[key], expected[key].to(state[key].dtype)):
                    raise _other_model(checkpoint, f"has other values in {key}")
            left -= set(state)
        if left:
            raise _other_model(checkpoint, f"has other values in {min(left)}")


@contextmanager
def _alone(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield a folder with links to the files of the source that an output will have. Random generators are restored."""
    source = checkpoint.source.folder
    with TemporaryDirectory() as place, torch.random.fork_rng(devices=[]):
        folder = Path(place) / source.name
        for name in checkpoint.counted:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to((source / name).resolve())
        yield folder


def _by_its_library(checkpoint: Checkpoint, folder: Path, load: Callable[[], T]) -> T:
    """Load from a folder of `_alone`. An error names the source's own folder."""
    source = checkpoint.source.folder
    try:
        return load()
    except CheckpointError as error:
        names, text = ", ".join(checkpoint.weight_files), str(error).replace(str(folder), str(source))
        raise CheckpointError(f"{text}\n{source}: its own library must load it from {names}; nothing was trained") from None


def _other_model(checkpoint: Checkpoint, what: str) -> CheckpointError:
    names = ", ".join(checkpoint.weight_files)
    return CheckpointError(f"{checkpoint.source.folder}: what its own library loads from {names} {what}; nothing was trained")


def report_lines(problems: list[str], output: Path) -> str:
    """Return the text that the command `verify` prints."""
    if problems:
        return "\n".join([f"{output}: not what it should be", *(f"  - {problem}" for problem in problems)])
    return f"{output}: same files, names, shapes, dtypes and metadata as the source; hashes and outputs as reported"
