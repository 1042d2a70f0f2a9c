"""README.md and .eval_results/ of an output: the source's metadata kept, ours measured, and no stranger's card harms."""

import json
import re

import pytest
import reports
import yaml
from builders import copy_folder
from conftest import SHORT
from huggingface_hub import ModelCard, parse_eval_result_entries
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import HOSTILE
from safetensors.torch import load_file

from dsd_refine.report.card import SourceCard, card, code, data_name, eval_results, front_matter, read_card

OWN = """---
language: no
license: cc-by-nc-4.0
license_name: 1.10
tags:
- image-classification
- timm
datasets:
- imagenet-1k
base_model: someone/older
date: 2020-01-01
extra: {deep: [1, 2.5, true, null], when: 12:30}
model-index:
- name: net
  results:
  - task: {type: image-classification}
    dataset: {name: ImageNet, type: imagenet-1k}
    metrics:
    - {type: accuracy, value: 0.99}
---
# Net  \r
Its own *text*, kept.\x0b
<b>html</b> | pipes |
"""


@pytest.fixture
def source(tmp_path):
    """Put a README.md into a folder and read it."""

    def made(text):
        (tmp_path / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_card(tmp_path)

    return made


def matter(text):
    """The front matter of a written card, as the Hub reads it."""
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("\n---\n", 1)[0][4:])


def written(own=None, report=None, **recipe):
    own = own or SourceCard({}, "")
    return card(report or reports.report(), own, reports.recipe(**recipe), "import timm")


# ---------------------------------------------------------------- front matter


def test_the_source_s_metadata_is_kept_and_ours_stands_over_it(source):
    text = written(source(OWN))
    front = matter(text)
    kept = {"language": "no", "license": "cc-by-nc-4.0", "date": "2020-01-01"}
    assert kept.items() <= front.items()
    assert front["extra"] == {"deep": [1, 2.5, True, None], "when": "12:30"}
    assert front["tags"] == ["image-classification", "timm", "dsd"]
    assert front["datasets"] == ["imagenet-1k"]
    assert (front["base_model"], front["base_model_relation"]) == ("org/net", "finetune")
    assert (front["library_name"], front["pipeline_tag"]) == ("timm", "image-classification")
    assert list(front)[:2] == ["language", "license"]


def test_results_are_those_measured_and_no_others(source):
    report = reports.report()
    (index,) = matter(written(source(OWN)))["model-index"]
    (result,) = index["results"]
    assert result["task"] == {"type": "image-classification"}
    assert result["dataset"] == {"name": "pictures", "type": "pictures"}
    assert {m["type"]: m["value"] for m in result["metrics"]} == report["arms"]["refined"]
    assert "0.99" not in written(source(OWN)).split("# Net")[0].replace("0.995", "")


def test_the_hub_s_own_reader_takes_it(source):
    read = ModelCard(written(source(OWN)))
    assert read.data.license == "cc-by-nc-4.0"
    assert {result.metric_type: result.metric_value for result in read.data.eval_results} == reports.report()["arms"]["refined"]
    assert "Its own *text*, kept." in read.text


def test_a_hub_data_set_is_named_as_the_hub_does():
    front = matter(written(data="org/birds:small"))
    assert front["datasets"] == ["org/birds"]
    dataset = front["model-index"][0]["results"][0]["dataset"]
    assert dataset == {"name": "org/birds:small", "type": "org/birds", "config": "small"}
    assert "datasets" not in matter(written())


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({"library": "timm"}, "org/net"),
        ({"library": "transformers"}, "org/net"),
        ({"resolved": "/home/x/net", "revision": None}, None),
        ({"resolved": "resnet18.V1", "revision": "abc", "library": "torchvision"}, None),
        ({"resolved": "some/place", "revision": None}, None),
    ],
)
def test_only_a_repository_is_a_base_model(changes, base):
    report = reports.report()
    report["source"] |= changes
    front = matter(written(report=report))
    assert front.get("base_model") == base
    assert ("base_model_relation" in front) == (base is not None)


@pytest.mark.parametrize(
    ("task", "tag"),
    [
        ("causal-lm", "text-generation"),
        ("masked-lm", "fill-mask"),
        ("ctc-speech", "automatic-speech-recognition"),
        ("of its own", None),
    ],
)
def test_pipeline_tags(task, tag):
    front = matter(written(report=reports.report(task=task)))
    assert front.get("pipeline_tag", None) == (tag or "of its own" if task != "of its own" else None)


def test_the_source_s_own_library_and_tag_are_kept():
    own = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity", "tags": "one", "datasets": None}
    front = front_matter(reports.report(), own, {"data": "org/birds"})
    assert (front["library_name"], front["pipeline_tag"]) == ("sentence-transformers", "sentence-similarity")
    assert (front["tags"], front["datasets"]) == (["one", "dsd"], ["org/birds"])
    odd = front_matter(reports.report(), {"library_name": [1], "tags": {"a": 1}, "datasets": [{"x": 1}, 3, True]}, {})
    assert (odd["library_name"], odd["tags"], odd["datasets"]) == ("timm", ["dsd"], ["3"])


# ---------------------------------------------------------------- strangers' cards

BROKEN = {
    "broken": "---\na: [1\n---\n",
    "a list": "---\n- a\n- b\n---\n",
    "text": "---\njust words\n---\n",
    "python": "---\na: !!python/object/apply:os.system [id]\n---\n",
    "alias": "---\na: &a [x, x]\nb: [*a, *a]\n---\n",
    "deep": "---\na: " + "[" * 5000 + "]" * 5000 + "\n---\n",
    "tabs": "---\n\ta: b\n---\n",
    "control": "---\na: \x07\n---\n",
    "unhashable": "---\n? [a, b]\n: c\n---\n",
    "huge": "---\na: '" + "x" * 1_000_001 + "'\n---\n",
    "nested keys": "---\na: {[1, 2]: 3}\n---\n",
    "colons": "---\nname: a: b\n---\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_front_matter_that_cannot_be_used_is_left_out_with_a_warning(source, kind):
    own = source(BROKEN[kind] + "# Kept\n\nwords")
    (warning,) = own.warnings
    assert "front matter" in warning
    assert len(warning) < 400
    assert own.front == {}
    text = written(own)
    assert matter(text)["tags"] == ["dsd"]
    assert text.endswith("# Kept\n\nwords")
    assert "os.system" not in text


@pytest.mark.parametrize(
    ("text", "front", "body"),
    [
        ("", {}, ""),
        ("# Only text\n", {}, "# Only text\n"),
        ("---\n---\nx", {}, "x"),
        ("---\na: 1\n---", {"a": 1}, ""),
        ("\ufeff---\r\na: 1\r\n---\r\nx\r\n", {"a": 1}, "x\r\n"),
        ("---\na: 1\nnever closed", {}, "---\na: 1\nnever closed"),
        ("text\n---\na: 1\n---\n", {}, "text\n---\na: 1\n---\n"),
        (
            "---\na: yes\nb: 0o7\nc: 1e-5\nd: .5\ne: ~\nf: 08\n---\n",
            {"a": "yes", "b": "0o7", "c": 1e-5, "d": 0.5, "e": None, "f": "08"},
            "",
        ),
        (b"---\na: \xff\n---\nb\xff", {"a": "\ufffd"}, "b\ufffd"),
        ("---\na: 1\n---\n---\nb: 2\n---\n", {"a": 1}, "---\nb: 2\n---\n"),
    ],
)
def test_front_matter_and_text_are_told_apart(source, text, front, body):
    own = source(text)
    assert (own.front, own.body, own.warnings) == (front, body, ())


def test_no_card_and_a_folder_called_so(tmp_path):
    assert read_card(tmp_path) == SourceCard({}, "")
    (tmp_path / "README.md").mkdir()
    assert read_card(tmp_path) == SourceCard({}, "")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["license", "tags", "datasets", "base_model", "model-index", "widget"]) | st.text(), VALUES, max_size=6
    )
)
@settings(deadline=None, max_examples=60)
def test_whatever_yaml_a_stranger_writes_ours_can_be_read(front):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as place:
        text = "---\n" + yaml.safe_dump(front, allow_unicode=True) + "---\nbody"
        Path(place, "README.md").write_bytes(text.encode("utf-8", "surrogatepass"))
        found = written(read_card(Path(place)))
    assert matter(found)["model-index"][0]["results"]
    assert found.endswith("body")


# ---------------------------------------------------------------- the text


def test_the_source_s_text_is_kept_to_the_byte(source):
    text = written(source(OWN))
    assert text.endswith(OWN.split("---\n", 2)[2])
    assert text.index("Refined with dsd-refine") < text.index("# Net")


@pytest.mark.parametrize("verdict", ["same", "inconclusive", "worse"])
def test_no_gain_is_claimed_that_is_not_shown(verdict):
    text = written(report=reports.report(verdict=verdict))
    assert f"**Verdict: {verdict}**" in text
    for claim in ("better than the source", "improve", "What was gained"):
        assert claim not in text


def test_arms_comparisons_and_the_gate_are_told():
    text = written(report=reports.report(gate={"rule": "beats-control", "passed": False}))
    assert "| refined | 0.9300 | 0.3000 |" in text
    assert "| refined vs baseline | +0.0300 | +0.0150 to +0.0410 | 2e-05 | 40 | 10 |" in text
    assert "The gate `beats-control` was not met" in text
    report = reports.report()
    report["seeds"] = reports.seeds_of(report)
    assert "| refined | 0.9300 | 0.3000 | 0.9200 ± 0.0040 |" in written(report=report)


def test_a_loss_has_no_rows_gained():
    text = written(report=reports.loss_report())
    assert "| refined vs baseline | -0.0500 | -0.1200 to +0.0200 | 0.4 |  |  |" in text
    assert "local directory" not in text
    assert "/home/someone" not in text  # nor in the recipe


def test_names_from_outside_stay_names():
    report = reports.report(gate={"rule": HOSTILE, "passed": False})
    report["source"] |= {"resolved": HOSTILE, "revision": HOSTILE}
    report["arms"][HOSTILE] = report["arms"].pop("dense")
    report["comparison"][f"refined_vs_{HOSTILE}"] = report["comparison"].pop("refined_vs_dense")
    text = written(report=report, data=HOSTILE.replace("/", " ") + "\n```\n---\n# out")
    matter(text)
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    shown = markdown.render(text.split("\n---\n", 1)[1])
    assert not re.search(r"<(script|svg|g|h1|hr)\b", shown)
    assert re.findall(r'<a href="([^"]*)"', shown) == ["https://arxiv.org/abs/1607.04381"]
    assert shown.count("<pre>") == 2
    assert shown.count("<tr>") == 1 + 3 + 1 + 2


@pytest.mark.parametrize("text", ["a", "`", "``", "a`b", "a``b`", "", "x\ny", "|"])
def test_a_code_span_holds_any_text(text):
    found = code(text)
    fence = re.match(r"`+", found)[0]
    inner = found[len(fence) : -len(fence)]
    assert fence not in re.findall(r"`+", inner)
    assert " ".join(text.split()) in inner
    assert "\n" not in found


@pytest.mark.parametrize(
    ("spec", "name", "hub"),
    [
        ("org/birds", "org/birds", "org/birds"),
        ("org/birds:small", "org/birds:small", "org/birds"),
        ("/data/birds/test.csv", "birds", None),
        ("/data/birds", "birds", None),
        ("/data/birds/validation", "birds", None),
        ("birds.parquet", "birds", None),
        ("./org/birds", "birds", None),
        (None, "data of one's own", None),
        ("..", "..", None),
    ],
)
def test_names_of_data(spec, name, hub):
    found = data_name(spec)
    assert (found.name, found.hub) == (name, hub)


def test_a_relative_folder_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/birds").mkdir(parents=True)
    assert data_name("org/birds").hub is None
    assert data_name("org/cats").hub == "org/cats"


# ---------------------------------------------------------------- .eval_results/


def test_evaluation_results_in_the_hub_s_form():
    ((name, text),) = eval_results(reports.report(), reports.recipe(data="org/birds:small")).items()
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (name, entry.dataset_id, entry.task_id, entry.value) == ("org-birds.yaml", "org/birds", "small", 0.93)
    assert "1000 rows" in entry.notes
    ((name, text),) = eval_results(reports.loss_report(), reports.recipe()).items()
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (name, entry.dataset_id, entry.value) == ("pictures.yaml", "local:pictures", 3.25)


@pytest.mark.parametrize("data", ["../../x", "a/" + "b" * 300, ".hidden", "\u0430", HOSTILE, "..", "/"])
def test_a_result_s_file_stays_in_its_folder(data):
    ((name, _),) = eval_results(reports.report(), reports.recipe(data=data)).items()
    assert re.fullmatch(r"\w[\w.-]{0,79}\.yaml", name)


# ---------------------------------------------------------------- real runs


def run_of(command, source, data, out, *more):
    found = command(source, "--data", data, "-o", out, *SHORT, "--quiet", *more)
    assert found.code in (0, 3), found.err
    return json.loads((out / "dsd/report.json").read_text())


def test_a_run_s_card_keeps_the_source_s_and_verify_passes(command, made, tmp_path):
    source = copy_folder(made / "bert", tmp_path / "bert")
    (source / "README.md").write_bytes(OWN.encode())
    (source / ".eval_results").mkdir()
    (source / ".eval_results/old.yaml").write_text("- {dataset: {id: a/b, task_id: c}, value: 1}\n")
    report = run_of(command, source, made / "texts.csv", tmp_path / "out")
    text = (tmp_path / "out/README.md").read_bytes().decode()
    front = matter(text)
    assert front["license"] == "cc-by-nc-4.0"
    assert {m["type"]: m["value"] for m in front["model-index"][0]["results"][0]["metrics"]} == report["arms"]["refined"]
    assert text.endswith(OWN.split("---\n", 2)[2])
    assert str(tmp_path) not in text
    (results,) = (tmp_path / "out/.eval_results").iterdir()
    assert yaml.safe_load(results.read_text())[0]["value"] == report["arms"]["refined"]["accuracy"]
    assert command("verify", source, tmp_path / "out").code == 0


def test_a_broken_card_is_warned_of_and_stops_nothing(command, made, tmp_path):
    source = copy_folder(made / "timm", tmp_path / "timm")
    (source / "README.md").write_text("---\na: [\n---\n# Kept\n")
    report = run_of(command, source, made / "pictures", tmp_path / "out")
    assert any("front matter" in warning for warning in report["warnings"])
    assert (tmp_path / "out/README.md").read_text().endswith("# Kept\n")


def test_a_rejected_checkpoint_has_a_card_but_no_results(command, made, tmp_path):
    report = run_of(command, made / "timm", made / "pictures", tmp_path / "out", "--gate", "better", "--lr", "0")
    assert not report["gate"]["passed"]
    text = (tmp_path / "out/rejected/README.md").read_text()
    assert "The gate `better` was not met" in text
    assert not (tmp_path / "out/rejected/.eval_results").exists()


@pytest.mark.parametrize("model", ["timm", "bert", "gpt2", "vit"])
def test_the_card_s_snippet_loads_the_output(command, made, tmp_path, model):
    data = {"timm": "pictures", "bert": "texts.csv", "gpt2": "documents.txt", "vit": "colours"}[model]
    run_of(command, made / model, made / data, tmp_path / "out")
    snippet = re.search(r"(?s)```python\n(.*?)```", (tmp_path / "out/README.md").read_text())[1]
    scope = {}
    exec(snippet.replace("path/to/this/folder", str(tmp_path / "out")), scope)
    state, found = scope["model"].state_dict(), load_file(tmp_path / "out/model.safetensors")
    sums = [{float(value.double().sum()) for value in tensors.values()} for tensors in (state, found)]  # names may be newer
    assert sums[1] <= sums[0]
