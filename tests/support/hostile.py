"""Broken and hostile input: seeded mutations of good files, and files made to harm.

A case is made in a folder of its own from good files, and says which command to run on it.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 7, 10**6, 10**9, 10**18, 2**63, -(2**63), 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf"),
    "", "x", "../../../etc/passwd", "/dev/zero", "evil/kernel", "kernels-community/flash-attn", "\x00", "é" * 50, "A" * 100_000,
    "{{ 7 * 7 }}", "$(touch pwned)", [], {}, [[]], [None], [0] * 1000, [10**9, 10**9], {"a": {"b": []}}, {"": 0},
)  # fmt: skip
EXTRA: dict[str, Any] = {
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"},
    "attn_implementation": "evil/kernel",
    "_attn_implementation": "kernels-community/flash-attn",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "model_args": {"checkpoint_path": "evil.pth"},
    "custom_load": True,
    "url": "http://127.0.0.1:9/evil.pth",
    "transformers_weights": "../evil.safetensors",
    "num_labels": 10**9,
    "num_hidden_layers": 10**8,
    "chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "__class__": "os.system",
    "torch_dtype": "evil",
    "dtype": "float8_e4m3fn",
    "pruned_heads": {"0": [0, 1, 99]},
    "id2label": {str(i): f"L{i}" for i in range(5)},
    "problem_type": "multi_label_classification",
    "is_decoder": True,
    "chunk_size_feed_forward": 7,
}


# ---------------------------------------------------------------- mutations


def bytes_changed(draw: Random, data: bytes) -> bytes:
    """One to eight small harms: a byte, a run, a cut, a doubling, a swap, an insertion."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        at = draw.randrange(len(out) + 1)
        to = min(len(out), at + draw.choice([1, 1, 4, 16, 256]))
        how = draw.randrange(6)
        if how == 0 and at < len(out):
            out[at] = draw.randrange(256)
        elif how == 1:
            out[at:to] = draw.randbytes(to - at)
        elif how == 2:
            del out[at : draw.choice([to, to, len(out)])]
        elif how == 3:
            out[at:at] = out[at:to]
        elif how == 4:
            out[at:at] = draw.choice([b"\x00", b"\xff" * 4, b"\n", b'"', b"}", b",", b"9" * 30, b"[" * 300, b"\xed\xa0\x80"])
        else:
            out[at:to] = bytes(to - at)
    return bytes(out)


def json_changed(draw: Random, value: Any) -> Any:
    """A copy in which one to three places hold something else, are gone, or are there twice."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return draw.choice(NASTY)
        holder, key = draw.choice(places)
        how = draw.randrange(5)
        if how == 0 and isinstance(holder, dict):
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[draw.choice([*EXTRA, "x", "__proto__", ""])] = copy.deepcopy(holder[key])
        elif how == 2 and isinstance(holder, dict):
            name = draw.choice([*EXTRA])
            holder[name] = copy.deepcopy(EXTRA[name])
        else:
            holder[key] = copy.deepcopy(draw.choice(NASTY))
    return value


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def spoil_json(draw: Random, path: Path) -> None:
    """Mutate a JSON file, mostly as JSON, sometimes as bytes, rarely into a bomb."""
    how = draw.random()
    if how < 0.7:
        path.write_text(json.dumps(json_changed(draw, json.loads(path.read_text()))))
    elif how < 0.95:
        path.write_bytes(bytes_changed(draw, path.read_bytes()))
    else:
        path.write_bytes(draw.choice([b"", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5_000_000, b"{}", b"null", b"\xff\xfe{}"]))


def spoil(draw: Random, path: Path) -> None:
    path.write_bytes(bytes_changed(draw, path.read_bytes()))


# ---------------------------------------------------------------- files made to harm


class Evil:
    """What a pickle of it does when it is loaded: leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def evil_pickle(path: Path, mark: Path) -> Path:
    path.write_bytes(pickle.dumps({"weight": Evil(mark)}))
    return path


def png(width: int, height: int, data: bytes | None = None, *more: bytes) -> bytes:
    """A grey PNG that claims a size; its pixels are black and packed well unless `data` says otherwise."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    packed = zlib.compress(bytes((width + 1) * height)) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def animated(frames: int = 4, kind: str = "GIF") -> bytes:
    out = io.BytesIO()
    pictures = [Image.new("L", (32, 32), 40 * number) for number in range(frames)]
    pictures[0].save(out, kind, save_all=True, append_images=pictures[1:])
    return out.getvalue()


def rotated(orientation: int) -> bytes:
    out, picture = io.BytesIO(), Image.new("RGB", (32, 24))
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(out, "JPEG", exif=exif)
    return out.getvalue()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(pwned) (w) file closefile\nshowpage\n%%EOF\n"
BOMBS: dict[str, Callable[[], bytes]] = {
    "50,000 x 50,000": lambda: png(50_000, 50_000, zlib.compress(bytes(1000))),
    "13,000 x 13,000": lambda: png(13_000, 13_000),
    "1 x 100,000": lambda: png(1, 100_000),
    "100,000 x 1": lambda: png(100_000, 1),
    "0 x 0": lambda: png(0, 0, b""),
    "animated": animated,
    "animated WebP": lambda: animated(kind="WEBP"),
    "upside down": lambda: rotated(3),
    "rotated": lambda: rotated(6),
    "no orientation": lambda: rotated(99),
    "PostScript": lambda: POSTSCRIPT,
    "text bomb": lambda: png(32, 32, None, _chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000)))),
    "colour profile bomb": lambda: png(32, 32, None, _chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(200_000_000)))),
    "empty": lambda: b"",
    "pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
}


# ---------------------------------------------------------------- cases

Case = Callable[[Random, Path, Path], list[Any]]
CASES: dict[str, Case] = {}
FEW = ("--gate", "none", "--control", "none", "--device", "cpu", "--quiet", "--sparse-steps", "1", "--dense-steps", "0")
DATA = {"timm": "pictures", "bert": "texts.csv", "gpt2": "documents.txt", "vit": "colours", "ctc": "clips"}


def case(function: Case) -> Case:
    CASES[function.__name__.removeprefix("a_")] = function
    return function


def run(folder: Path, made: Path, model: str, *more: Any, data: Any = None) -> list[Any]:
    """Arguments of a run on the case's copy of a model, else on the good one."""
    source = folder / model if (folder / model).exists() else made / model
    return [source, "--data", data or made / DATA[model], "-o", folder / "out", *FEW, *more]


def copied(made: Path, folder: Path, model: str) -> Path:
    return Path(shutil.copytree(made / model, folder / model))


@case
def a_header(draw: Random, folder: Path, made: Path) -> list[Any]:
    model = draw.choice(["timm", "bert"])
    path = copied(made, folder, model) / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, how = json.loads(raw[8 : 8 + length]), draw.randrange(5)
    if how == 0:
        text = bytes_changed(draw, raw[8 : 8 + length])
    elif how == 1:
        path.write_bytes(struct.pack("<Q", draw.choice([0, 1, 7, length - 1, length + 1, 2**32, 2**63, 2**64 - 1])) + raw[8:])
        return run(folder, made, model)
    elif how == 2:
        path.write_bytes(raw[: draw.randrange(len(raw))])
        return run(folder, made, model)
    else:
        text = json.dumps(_header_changed(draw, header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return run(folder, made, model)


def _header_changed(draw: Random, header: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in header if name != "__metadata__"]
    one, two = header[draw.choice(names)], header[draw.choice(names)]
    how = draw.randrange(6)
    if how == 0:
        one["data_offsets"] = two["data_offsets"]
    elif how == 1:
        one["shape"] = draw.choice([[], [0], [2**40, 2**40], [-1], one["shape"][::-1], [*one["shape"], 1]])
    elif how == 2:
        one["dtype"] = draw.choice(["F64", "F16", "I8", "F8_E4M3", "F4", "", None, "BOOL", "F32 "])
    elif how == 3:
        header[draw.choice(["", "..", "x/../../y", "a" * 10_000, "\x00"])] = header.pop(draw.choice(names))
    elif how == 4:
        one["data_offsets"] = [draw.choice([0, -1, 2**62, one["data_offsets"][0] + 1]), draw.choice([0, 2**63, 5])]
    else:
        changed: dict[str, Any] = json_changed(draw, header)
        return changed
    return header


@case
def a_index(draw: Random, folder: Path, made: Path) -> list[Any]:
    source = Path(shutil.copytree(made / "sharded", folder / "bert"))
    index = source / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    names, how = list(found["weight_map"]), draw.randrange(7)
    if how == 0:
        found["weight_map"][draw.choice(names)] = draw.choice(
            ["../x.safetensors", "/etc/passwd", "..", "", "absent", "dir/x", "a\0b"]
        )
    elif how == 1:
        del found["weight_map"][draw.choice(names)]
    elif how == 2:
        found["weight_map"][f"{draw.choice(names)}.more"] = found["weight_map"][names[0]]
    elif how == 3:
        shutil.copy(source / "one.safetensors", source / "two.safetensors")
    elif how == 4:
        (source / "two.safetensors").unlink()
        (source / "two.safetensors").symlink_to(
            draw.choice(["/dev/zero", "/etc/passwd", "one.safetensors", "two.safetensors", "absent"])
        )
    elif how == 5:
        found = json_changed(draw, found)
    index.write_text(json.dumps(found))
    if how == 6:
        spoil(draw, index)
    return run(folder, made, "bert")


@case
def a_config(draw: Random, folder: Path, made: Path) -> list[Any]:
    model = draw.choice(["timm", "bert", "gpt2", "vit"])
    spoil_json(draw, copied(made, folder, model) / "config.json")
    return run(folder, made, model)


@case
def a_preprocessor(draw: Random, folder: Path, made: Path) -> list[Any]:
    name = next((made / "vit").glob("*processor*.json")).name
    spoil_json(draw, copied(made, folder, "vit") / name)
    return run(folder, made, "vit")


@case
def a_tokenizer(draw: Random, folder: Path, made: Path) -> list[Any]:
    model = draw.choice(["bert", "gpt2"])
    spoil_json(draw, copied(made, folder, model) / draw.choice(["tokenizer.json", "tokenizer_config.json"]))
    return run(folder, made, model)


RECIPE = """name: mine
phases:
  - {kind: sparse, steps: 1, lr: 0.01, sparsity: 0.3}
  - {kind: dense, steps: 0, lr: 0.001}
batch_size: 8
control: []
augment: {crop: none, flip: 0.5}
"""
RECIPE_BOMBS = (
    "a: &a [x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(20)),
    "phases: " + "[" * 20_000,
    "phases: " + "{a: " * 5_000,
    "phases: [{kind: sparse, steps: 1e999, lr: .nan, sparsity: .inf}]",
    "phases: [{kind: sparse, steps: 99999999999999999999999999, lr: 1, sparsity: 0.3}]",
    f"phases: {'9' * 100_000}",
    "!!python/object/apply:os.system ['touch pwned']",
    "? [a, b]\n: c",
    "phases: !!binary aGVsbG8=",
    "--- a\n--- b",
    "phases:\n" + "  - {kind: dense, steps: 1, lr: 0.1}\n" * 20_000,
    "\x00\x01",
    "%YAML 9.9\n---\na: 1",
)


@case
def a_recipe(draw: Random, folder: Path, made: Path) -> list[Any]:
    import yaml

    path, how = folder / "recipe.yaml", draw.random()
    if how < 0.15:
        path.write_text(draw.choice(RECIPE_BOMBS))
    elif how < 0.5:
        path.write_bytes(bytes_changed(draw, RECIPE.encode()))
    else:
        path.write_text(yaml.safe_dump(json_changed(draw, yaml.safe_load(RECIPE)), allow_unicode=True))
    found = run(folder, made, "timm", "--recipe", path)
    return [arg for arg in found if arg not in ("--sparse-steps", "--dense-steps", "1", "0")]


@case
def a_table(draw: Random, folder: Path, made: Path) -> list[Any]:
    kind = draw.choice(["csv", "jsonl", "json", "parquet", "tsv", "txt"])
    path = folder / f"data.{kind}"
    path.write_bytes((made / f"texts.{kind}").read_bytes())
    lines = path.read_bytes().splitlines(keepends=True) if kind != "parquet" else []
    if draw.random() < 0.6 or not lines:
        spoil(draw, path)
    else:
        at = draw.randrange(len(lines))
        lines[at] = draw.choice(
            [b"", lines[0], b"\n", b'"open\n', b"," * 500 + b"\n", b"\x00" * 40, b'{"text": [1, {"a": 2}], "label": null}\n',
             b'{"text": "a", "label": "neg", "text": 3}\n', b"x" * 2_000_000 + b",neg\n", b"\xff\xfe\xfd\n", b"[" * 50_000 + b"\n"]
        )  # fmt: skip
        path.write_bytes(b"".join(lines))
    model = "gpt2" if kind == "txt" else draw.choice(["bert", "bert", "gpt2"])
    return run(folder, made, model, data=path)


@case
def a_picture(draw: Random, folder: Path, made: Path) -> list[Any]:
    model = draw.choice(["timm", "vit"])
    data = Path(shutil.copytree(made / "few", folder / "data"))
    files = sorted(data.rglob("*.*"))
    for path in draw.sample(files, draw.randint(1, 4)):
        how = draw.random()
        if how < 0.2:
            path.write_bytes(BOMBS[draw.choice(sorted(BOMBS))]())
        elif how < 0.3:
            path.unlink()
            draw.choice(
                [
                    lambda p: os.mkfifo(p),
                    lambda p: p.symlink_to("/dev/zero"),
                    lambda p: p.symlink_to("/etc/passwd"),
                    lambda p: p.symlink_to(p.name),
                    lambda p: p.mkdir(),
                ]
            )(path)
        else:
            spoil(draw, path)
    return run(folder, made, model, data=data)


def wav(rate: int, samples: bytes, claimed: int | None = None, channels: int = 1) -> bytes:
    """A 16-bit WAV file that may claim another length than it has."""
    size = len(samples) if claimed is None else claimed
    form = struct.pack("<HHIIHH", 1, channels, rate, min(2 * rate * channels, 2**32 - 1), 2 * channels % 65536, 16)
    return b"RIFF" + struct.pack("<I", (36 + size) % 2**32) + b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack(
        "<I", size % 2**32
    ) + samples  # fmt: skip


@cache
def packed_silence(samples: int = 110_000_000) -> bytes:
    """A FLAC of hours in a few hundred kilobytes."""
    import numpy as np
    import soundfile

    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", 8000, 1, format="FLAC") as file:
        for _ in range(10):
            file.write(np.zeros(samples // 10, dtype=np.int16))
    return out.getvalue()


SOUND_BOMBS: dict[str, Callable[[], bytes]] = {
    "a sample a second": lambda: wav(1, bytes(2_000_000)),
    "two thousand million a second": lambda: wav(2**31 - 1, bytes(20_000)),
    "no rate": lambda: wav(0, bytes(2000)),
    "four gigabytes claimed": lambda: wav(8000, bytes(2000), 2**32 - 1),
    "no samples": lambda: wav(8000, b""),
    "no channels": lambda: wav(8000, bytes(2000), channels=0),
    "a thousand channels": lambda: wav(8000, bytes(200_000), channels=1000),
    "hours of silence": packed_silence,
    "empty": lambda: b"",
}


@case
def a_clip(draw: Random, folder: Path, made: Path) -> list[Any]:
    data = Path(shutil.copytree(made / "clips", folder / "data"))
    for path in draw.sample(sorted(data.rglob("*.wav")), 3):
        if draw.random() < 0.3:
            path.write_bytes(SOUND_BOMBS[draw.choice(sorted(SOUND_BOMBS))]())
        else:
            spoil(draw, path)
    return run(folder, made, "ctc", data=data)


@case
def a_feature_extractor(draw: Random, folder: Path, made: Path) -> list[Any]:
    source = copied(made, folder, "ctc")
    spoil_json(draw, source / draw.choice(["config.json", next(source.glob("*processor*.json")).name]))
    return run(folder, made, "ctc")


@case
def a_listing(draw: Random, folder: Path, made: Path) -> list[Any]:
    """Pictures that a metadata file names."""
    data = Path(shutil.copytree(made / "few/train/a", folder / "data"))
    names = [*sorted(p.name for p in data.iterdir()), "absent.png", ""]
    rows = [(draw.choice(names), draw.choice(["a", "b", "c"])) for _ in range(24)]
    if draw.random() < 0.5:
        name = draw.choice(["../data/000.png", "../made", "/etc/passwd", "/dev/zero", ".", "..", "a\x00b", "x" * 300, names[0]])
        rows[draw.randrange(24)] = (name, draw.choice(["a", "d", "", "1", "é"]))
    (data / "metadata.csv").write_text("file_name,label\n" + "".join(f"{name},{label}\n" for name, label in rows))
    if draw.random() < 0.3:
        spoil(draw, data / "metadata.csv")
    return run(folder, made, "timm", data=data)


@case
def a_saved_data_set(draw: Random, folder: Path, made: Path) -> list[Any]:
    data = Path(shutil.copytree(made / "saved", folder / "data"))
    path = draw.choice([path for path in sorted(data.rglob("*")) if path.is_file()])
    spoil_json(draw, path) if path.suffix == ".json" else spoil(draw, path)
    return run(folder, made, "bert", data=data)


@case
def a_pickle(draw: Random, folder: Path, made: Path) -> list[Any]:
    source = copied(made, folder, "bert")
    (source / "model.safetensors").unlink()
    path = source / draw.choice(["pytorch_model.bin", "weights.pth"])
    if draw.random() < 0.2:
        evil_pickle(path, folder / "pwned")
    else:
        path.write_bytes(bytes_changed(draw, (made / "pickled.bin").read_bytes()))
    return run(folder, made, "bert", *draw.choice([[], ["--allow-pickle"], ["--allow-pickle"]]))


NAMES = (
    "../x",
    "/etc/passwd",
    "/dev/zero",
    "link",
    "x" * 300,
    "é" * 200,
    "a/" * 3000,
    "\ud800",
    "a\x00b",
    "",
    ".",
    "dsd",
    10**400,
)


@case
def a_output(draw: Random, folder: Path, made: Path) -> list[Any]:
    """What `verify` is given."""
    out = Path(shutil.copytree(made / "finished", folder / "out"))
    path = out / draw.choice(
        ["dsd/report.json", "dsd/report.json", "dsd/probe.safetensors", "model.safetensors", "config.json"]
    )
    if path.name == "report.json" and draw.random() < 0.4:
        report = json.loads(path.read_text())
        draw.choice(report[draw.choice(["output", "source"])]["files"])["name"] = draw.choice([*NAMES, *NASTY])
        path.write_text(json.dumps(report))
        (out / "link").symlink_to(draw.choice(["link", "/etc/passwd", "/dev/zero", "model.safetensors"]))
    else:
        spoil_json(draw, path) if path.suffix == ".json" else spoil(draw, path)
    return ["verify", made / "bert", out]


@case
def a_plan(draw: Random, folder: Path, made: Path) -> list[Any]:
    """Configs again, by the command that reads no weights."""
    model = draw.choice(["timm", "bert", "gpt2", "vit"])
    spoil_json(draw, copied(made, folder, model) / "config.json")
    return ["plan", folder / model]


@case
def a_saved_state(draw: Random, folder: Path, made: Path) -> list[Any]:
    """A run that is taken up again on what is no longer what it saved."""
    partial = Path(shutil.copytree(made / "stopped.partial", folder / "out.partial"))
    path = draw.choice([path for path in sorted(partial.iterdir()) if path.suffix in (".json", ".safetensors", ".jsonl")])
    spoil_json(draw, path) if path.suffix == ".json" else spoil(draw, path)
    return [*run(folder, made, "bert", "--resume")]


def make_good(made: Path) -> None:
    """The good files that cases are made from: run in a child, since it trains."""
    import builders
    import datasets
    import torch
    from safetensors.torch import load_file

    for name in ("timm", "bert", "gpt2", "vit", "ctc"):
        getattr(builders, f"{name}_checkpoint")(made / name)
    builders.speech_folder(made / "clips")
    builders.image_folder(made / "pictures")
    builders.image_folder(made / "colours", channels=3)
    builders.image_folder(made / "few", per_class=6, splits=("train", "test"))
    for number, path in enumerate(sorted((made / "few").rglob("*.png"))):
        if number % 2:
            kind = ("JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")[number // 2 % 6]
            picture = Image.open(path)
            path.unlink()
            picture.save(path.with_suffix({"JPEG": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")), kind)
    builders.text_csv(made / "texts.csv")
    builders.text_file(made / "documents.txt")
    shutil.copy(made / "documents.txt", made / "texts.txt")
    rows = datasets.Dataset.from_csv(str(made / "texts.csv"), cache_dir=str(made / "cache"))
    rows.to_parquet(made / "texts.parquet")
    rows.to_json(made / "texts.jsonl")
    shutil.copy(made / "texts.jsonl", made / "texts.json")
    rows.to_csv(made / "texts.tsv", sep="\t", index=False)
    rows.save_to_disk(made / "saved")
    tensors = load_file(made / "bert/model.safetensors")
    torch.save(tensors, made / "pickled.bin")
    names = sorted(tensors)
    shutil.copytree(made / "bert", made / "sharded")
    builders.write_shards(
        made / "sharded",
        {"one.safetensors": {n: tensors[n] for n in names[::2]}, "two.safetensors": {n: tensors[n] for n in names[1::2]}},
    )
