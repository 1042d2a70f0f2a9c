"""ImageNet-1k in the forms that it comes in: integers without names, descriptions, WordNet ids; never a silently wrong label."""

import io
import json
import tarfile

import builders
import datasets
import numpy as np
import pyarrow.parquet
import pytest
from forked import Child, preload
from forked import command as forked_command
from hub import hub, on_hub
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.models._meta import _IMAGENET_CATEGORIES

from dsd_refine.checkpoint.libraries.class_names import imagenet_names
from dsd_refine.data.labels import match_labels

INFO = ImageNetInfo("imagenet-1k")
SYNSETS = [str(INFO.index_to_label_name(number)) for number in range(1000)]
TEXTS = [str(INFO.index_to_description(number)) for number in range(1000)]
USED = (0, 7, 134, 517)  # two of them are a crane
STEPS = ("--sparse-steps", "1", "--dense-steps", "1", "--control", "none", "--gate", "none", "--batch-size", "8",
         "--device", "cpu", "--quiet", "--set", "augment.crop=none")  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """ImageNet models: timm's classes are named by synsets, torchvision's by short words."""
    place = tmp_path_factory.mktemp("models")
    builders.timm_checkpoint(place / "timm", 1000, in_chans=3)
    builders.torchvision_checkpoint(place / "torchvision", classes=_IMAGENET_CATEGORIES)
    return place


def picture(number):
    draw, held = np.random.default_rng(number), io.BytesIO()
    Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(held, "JPEG")
    return held.getvalue()


def samples(split, numbers=USED, rows=40):
    """(key, class number, picture, json) as timm/imagenet-1k-wds has them: validation's file names say no class."""
    for row in range(rows):
        number = numbers[row % len(numbers)]
        key = f"{SYNSETS[number]}_{row}" if split == "train" else f"ILSVRC2012_val_{row + 1:08}"
        yield key, number, picture([row, split == "train"]), {"filename": f"{key}.JPEG", "label": number}


def shard(path, split):
    with tarfile.open(path, "w") as tar:
        for key, number, jpeg, said in samples(split):
            for suffix, body in (("cls", str(number).encode()), ("jpg", jpeg), ("json", json.dumps(said).encode())):
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(body)
                tar.addfile(entry, io.BytesIO(body))


def table(folder, *, numbers=USED, cls=lambda number: number, key=lambda key: key):
    """train.parquet and validation.parquet with webdataset's columns, without `datasets`' own notes of their types."""
    folder.mkdir()
    for split in ("train", "validation"):
        rows = [
            {"jpg": {"bytes": jpeg, "path": None}, "cls": cls(n), "json": said | {"filename": key(said["filename"])}, "__key__": key(k)}
            for k, n, jpeg, said in samples(split, numbers)
        ]  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


def judged(out):
    """(label as the data says it, target by the model's name) of the evaluation rows, and the report's labels."""
    report = json.loads((out / "dsd/report.json").read_text())
    return pyarrow.parquet.read_table(out / "dsd/predictions.parquet")["target"].to_pylist(), report["labels"]


def test_the_hub_s_webdataset_goes_with_the_shipped_recipes(models, tmp_path):
    """Its columns are found, its integers are the sorted synsets; nothing has to be said about them."""
    preload()
    place = tmp_path / "wds"
    place.mkdir()
    shard(place / "imagenet1k-train-0000.tar", "train")
    shard(place / "imagenet1k-validation-00.tar", "validation")
    args = (models / "timm", "--recipe", "resnet18", "--data", "timm/imagenet-1k-wds", "-o", tmp_path / "out", *STEPS)
    with hub({}, datasets={"timm/imagenet-1k-wds": place}) as server:
        child = Child(on_hub(server.url, tmp_path / "home", forked_command(*args)), tmp_path / "log")
        assert child.wait() == 0, child.said()
    targets, labels = judged(tmp_path / "out")
    assert targets == [SYNSETS[number] for _, number, _, _ in samples("validation")]
    assert labels["rule"].startswith("by name, integers by the names")


@pytest.mark.parametrize(("model", "names"), [("timm", SYNSETS), ("torchvision", _IMAGENET_CATEGORIES)])
def test_a_copy_of_it_goes_where_its_names_are_said(command, models, tmp_path, model, names):
    place = table(tmp_path / "copy")
    args = (models / model, "--data", place, "-o", tmp_path / "out", *STEPS, "--set", "label_names=imagenet-1k")
    found = command(*args)
    assert found.code == 0, found.err
    assert judged(tmp_path / "out")[0] == [names[number] for _, number, _, _ in samples("validation")]


def test_integers_that_nobody_named_are_refused_with_the_remedy(refused, models, tmp_path):
    said = refused(models / "timm", "--data", table(tmp_path / "copy"), "-o", tmp_path / "out", *STEPS)
    assert "no class names of the model: 0, 134, 517, 7" in said
    assert "--set 'label_names=[…]'" in said


def test_a_subset_numbered_anew_is_no_imagenet_1k(refused, models, tmp_path):
    """ImageNet-100 and the like count their own classes: the file names give them away."""
    place = table(tmp_path / "subset", cls=USED.index)
    said = refused(models / "timm", "--data", place, "-o", tmp_path / "out", *STEPS, "--set", "label_names=imagenet-1k")
    assert f"row 1: its label 1 would be {SYNSETS[1]}, its file is of {SYNSETS[7]}" in said


def test_a_subset_goes_by_names_of_its_own(command, models, tmp_path):
    place = table(tmp_path / "subset", cls=USED.index)
    own = [SYNSETS[number] for number in USED]
    found = command(models / "timm", "--data", place, "-o", tmp_path / "out", *STEPS, "--set", f"label_names=[{','.join(own)}]")
    assert found.code == 0, found.err
    targets, labels = judged(tmp_path / "out")
    assert targets == [SYNSETS[number] for _, number, _, _ in samples("validation")]
    assert set(labels["data"]) == set(own)


def test_a_number_beyond_the_names_is_refused(refused, models, tmp_path):
    place = table(tmp_path / "copy", cls=lambda number: number + 600, key=lambda key: "x")
    said = refused(models / "timm", "--data", place, "-o", tmp_path / "out", *STEPS, "--set", "label_names=imagenet-1k")
    assert "class id 1117 is outside 0..999" in said


@pytest.mark.parametrize("given", ["imagenet", "[a, a]", "[1, 2]", "[]"])
def test_names_that_are_none_are_refused(refused, made, tmp_path, given):
    said = refused(made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", "--set", f"label_names={given}")
    assert "label_names: expected `imagenet-1k`, or a list of names" in said


@pytest.mark.parametrize(("model", "names"), [("timm", SYNSETS), ("torchvision", _IMAGENET_CATEGORIES)])
@pytest.mark.parametrize("form", ["folders", "descriptions"])
def test_synset_folders_and_the_hub_s_descriptions_mean_the_models_classes(command, models, tmp_path, model, names, form):
    """A local ImageNet has folders n01440764, …; ILSVRC/imagenet-1k declares descriptions, the second crane as `crane2`."""
    place = tmp_path / "data"
    if form == "folders":
        for split in ("train", "val"):
            for key, number, jpeg, _ in samples(split):
                (place / split / SYNSETS[number]).mkdir(parents=True, exist_ok=True)
                (place / split / SYNSETS[number] / f"{key}.JPEG").write_bytes(jpeg)
    else:
        kinds = datasets.ClassLabel(names=[*TEXTS[:517], "crane2", *TEXTS[518:]])
        features = datasets.Features({"image": datasets.Image(), "label": kinds})
        columns = {
            split: {"image": [jpeg for _, _, jpeg, _ in samples(split)], "label": [n for _, n, _, _ in samples(split)]}
            for split in ("train", "validation")
        }
        columns["test"] = {"image": [picture(99)], "label": [-1]}  # its labels are not public
        found = {split: datasets.Dataset.from_dict(held, features=features) for split, held in columns.items()}
        datasets.DatasetDict(found).save_to_disk(str(place))
    found = command(models / model, "--data", place, "-o", tmp_path / "out", *STEPS)
    assert found.code == 0, found.err
    expected = [names[number] for _, number, _, _ in samples("val")]
    assert sorted(judged(tmp_path / "out")[0]) == sorted(expected)
    if form == "descriptions":
        assert judged(tmp_path / "out")[0] == expected


# ---------------------------------------------------------------- heads of other sizes

SUBSETS = {
    11221: "imagenet-21k-miil",
    11821: "imagenet-12k",
    21841: "imagenet-22k",
    21842: "imagenet-22k-ms",
    21843: "imagenet-21k-goog",
}


@pytest.mark.parametrize("classes", SUBSETS)
def test_a_head_of_each_imagenet_knows_its_synsets(classes):
    info = ImageNetInfo(SUBSETS[classes])
    aliases = imagenet_names(classes)
    chosen = {info.index_to_label_name(number): number for number in (0, 1, 777, classes - 1)}
    assert match_labels(aliases, classes, set(chosen)).ids == chosen


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_head_of_1001_has_the_background_first(library):
    aliases = {
        "timm": imagenet_names(1001),
        "transformers": [["background"], *([text] for text in TEXTS)],
    }[library]
    found = match_labels(aliases, 1001, set(SYNSETS))
    assert found.ids == {synset: number + 1 for number, synset in enumerate(SYNSETS)}
    assert match_labels(aliases, 1001, {"background", "tench, Tinca tinca", "crane2"}).ids == {
        "background": 0, "tench, Tinca tinca": 1, "crane2": 518,
    }  # fmt: skip
    hub = [*TEXTS[:517], "crane2", *TEXTS[518:]]
    assert match_labels(aliases, 1001, {"crane"}, hub).ids == {"crane": 135}


def test_descriptions_of_a_large_head_know_their_synsets():
    """BEiT and the like name their 21841 classes by description; the folders of ImageNet are synsets."""
    info = ImageNetInfo("imagenet-22k")
    aliases = [[str(info.index_to_description(number))] for number in range(21841)]
    chosen = {info.index_to_label_name(number): number for number in (0, 5, 20000)}
    assert match_labels(aliases, 21841, set(chosen)).ids == chosen


@pytest.mark.parametrize("classes", [1001, 11221])
def test_synset_folders_go_with_such_a_head(command, tmp_path, classes):
    names = {1001: SYNSETS, 11221: ImageNetInfo(SUBSETS[11221]).label_names()}[classes]
    source = builders.timm_checkpoint(tmp_path / "m", classes, in_chans=3)
    data = builders.image_folder(tmp_path / "d", [names[3], names[900]], channels=3)
    found = command(source, "--data", data, "-o", tmp_path / "out", *STEPS)
    assert found.code == 0, found.err
    targets, labels = judged(tmp_path / "out")
    assert targets == [names[3]] * 8 + [names[900]] * 8
    assert labels["model"].index(names[3]) == (4 if classes == 1001 else 3)
