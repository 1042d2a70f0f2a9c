"""Pictures that are not what they seem: turned, of 12 bits, no pictures at all; and preprocessing that does not fit its model."""

import io
import json

import builders
import numpy as np
import pytest
from conftest import SHORT
from outputs import report_of
from PIL import Image

from dsd_refine.errors import DataError
from dsd_refine.tasks.inputs.images import Seen, decode, look, look_warnings

QUICK = (*SHORT, "--control", "none", "--quiet")
RAMP = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))


def file(image, kind="png", **options):
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def wide(top, kind="png"):
    return file(Image.fromarray(np.linspace(0, top, 1024).astype(np.uint16).reshape(32, 32)), kind)


def colours(top):
    """A PNG of three times 16 bits, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    pixels = np.linspace(0, top, 8 * 8 * 3).astype(">u2").reshape(8, 24)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def warnings_of(command, *args):
    found = command(*args)
    assert found.code == 0, found.err
    lines = report_of(args[args.index("-o") + 1])["warnings"]
    return [line for line in lines if "pictures" in line]


# ---------------------------------------------------------------- turned


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_seen_upright_and_known_to_be_turned(kind, orientation):
    _, seen = look(file(Image.fromarray(RAMP), kind, exif=turned(orientation)), 1)
    assert seen == Seen(turned=orientation != 1)


def test_a_tiff_is_turned_by_pillow_itself_and_so_in_every_library():
    image, seen = look(file(Image.fromarray(RAMP[:4]), "tiff", exif=turned(6)), 1)
    assert image.size == (4, 32)
    assert seen == Seen()


def test_turned_pictures_are_counted_and_the_first_is_named(command, made, tmp_path):
    data = builders.image_folder(tmp_path / "d")
    for name in ("train/b/002.png", "train/c/001.png", "test/a/000.png"):
        Image.open(data / name).save(data / name, exif=turned(6))
    Image.open(data / "train/a/000.png").save(data / "train/a/000.png", exif=turned(1))
    (line,) = warnings_of(command, made / "timm", "--data", data, "-o", tmp_path / "out", *QUICK)
    assert line.startswith("3 of 48 pictures (the first: test/a/000.png) are turned upright")
    assert "timm and torchvision leave them as they are stored" in line


def test_turned_pictures_with_captions_are_counted_too(command, tmp_path):
    data = builders.caption_folder(tmp_path / "d")
    Image.open(data / "test/003.png").save(data / "test/003.png", exif=turned(3))
    source = builders.caption_checkpoint(tmp_path / "m")
    (line,) = warnings_of(command, source, "--data", data, "-o", tmp_path / "out", *QUICK)
    assert line.startswith("1 of 24 pictures (the first: test/003.png) are turned upright")


# ---------------------------------------------------------------- sixteen bits


@pytest.mark.parametrize(
    ("raw", "peak"),
    [
        (wide(4095), 4095),
        (wide(65535), 65535),
        (wide(900, "tiff"), 900),
        (colours(65535), 65535),
        (colours(4095), 4095),
        (file(Image.fromarray(RAMP)), None),
        (file(Image.fromarray(RAMP).convert("RGBA")), None),
        (file(Image.fromarray(RAMP), "tiff"), None),
        (file(Image.fromarray(RAMP).convert("1")), None),
    ],
)
def test_the_largest_value_of_sixteen_bits(raw, peak):
    assert look(raw, 3)[1].peak == peak


@pytest.mark.parametrize(
    ("peaks", "says"),
    [
        ([None, None], None),
        ([65535, 65535], None),
        ([40000, 20000], None),
        ([4095, 3000], "2 of 2 pictures of 16 bits (the first: 0) hold no value above 4095"),
        ([16383, 9000, None], "2 of 2 pictures of 16 bits (the first: 0) hold no value above 16383"),
        ([65535, None, 4095], "1 of 2 pictures of 16 bits (the first: 2) hold no value above 4095"),
        ([255], "If their full range is 255, multiply their values by 256"),
        ([0], "at most 0 of 255. If their full range is 255"),
        ([4000], "nearly black, at most 15 of 255. If their full range is 4095, multiply their values by 16"),
        ([10000], "If their full range is 16383, multiply their values by 4"),
    ],
)
def test_pictures_that_come_out_nearly_black(peaks, says):
    lines = look_warnings([(number, Seen(peak=peak)) for number, peak in enumerate(peaks)])
    assert len(lines) == (says is not None)
    assert says is None or says in lines[0]


def test_what_the_warning_advises_cures(command, made, tmp_path):
    data = builders.image_folder(tmp_path / "d")
    files = sorted(data.rglob("*.png"))
    for path in files:
        dark = np.array(Image.open(path)).astype(np.uint16) * 16
        Image.fromarray(dark).save(path)
    args = (made / "timm", "--data", data, "-o", tmp_path / "out", *QUICK, "--overwrite")
    (line,) = warnings_of(command, *args)
    assert line.startswith("48 of 48 pictures of 16 bits (the first: test/a/000.png) hold no value above ")
    assert "multiply their values by 16" in line
    for path in files:
        Image.fromarray(np.array(Image.open(path)) * 16).save(path)
    assert warnings_of(command, *args) == []


# ---------------------------------------------------------------- no pictures


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "the file is empty"),
        (b"<html>", "not one of the known formats"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    ],
)
def test_what_is_no_picture_is_said_in_words(refused, made, tmp_path, raw, says):
    with pytest.raises(DataError, match=says):
        decode(raw, 3)
    data = builders.image_folder(tmp_path / "d", per_class=2, splits=[])
    for path in data.rglob("*.png"):
        path.write_bytes(raw)
    said = refused(made / "timm", "--data", data, "-o", tmp_path / "out", *QUICK)
    assert says in said
    assert said.endswith("the first is a/000.png")


# ---------------------------------------------------------------- preprocessing


def preprocessed(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"] |= fields
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize(("channels", "values"), [(1, 3), (3, 2), (3, 4), (1, 2)])
def test_statistics_of_another_number_of_channels_are_refused(refused, made, tmp_path, name, channels, values):
    source = preprocessed(builders.timm_checkpoint(tmp_path / "m", in_chans=channels), **{name: [0.5] * values})
    said = refused(source, "--data", made / "pictures", "-o", tmp_path / "out", *QUICK)
    assert f"{values} values of `{name}`" in said
    assert f"{channels} channels (in_chans): give `{name}` one value for each channel" in said


def test_one_value_for_all_channels_is_as_the_library_takes_it(command, made, tmp_path):
    accuracy = []
    for number, values in enumerate(([0.4], [0.4] * 3)):
        source = preprocessed(builders.timm_checkpoint(tmp_path / f"m{number}", in_chans=3), mean=values, std=values)
        found = command(source, "--data", made / "colours", "-o", tmp_path / f"out{number}", *QUICK)
        assert found.code == 0, found.err
        accuracy.append(report_of(tmp_path / f"out{number}")["arms"]["baseline"])
    assert accuracy[0] == accuracy[1]


def test_a_torchvision_config_of_two_means_is_refused(refused, made, tmp_path):
    source = builders.torchvision_checkpoint(tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    config["preprocessing"]["mean"] = [0.5, 0.5]
    (source / "config.json").write_text(json.dumps(config))
    said = refused(source, "--data", made / "colours", "-o", tmp_path / "out", *QUICK)
    assert "the preprocessing of config.json is not usable" in said
