"""image-captioning: captions as each family trains on them, written greedily at the end, BLEU that can be counted again."""

import json

import builders
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SHORT
from outputs import near, report_of, same
from runs import fresh, run_command, stop_after, two_processes
from sacrebleu.metrics import BLEU
from safetensors.torch import load_file
from tasks import open_task

from dsd_refine.checkpoint.libraries.transformers import TransformersLibrary
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.evidence.compare import bootstrap_corpus, compare, corpus_over_seeds
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.tasks.base import Scores
from dsd_refine.tasks.image_captioning import row_score
from dsd_refine.tasks.text_metrics import bleu, bleu_signature

KINDS = ("vit-gpt2", "vit-bert", "blip", "git")
QUIET = (*SHORT, "--quiet", "--lr", "0.01", "--warmup-steps", "0")
WORDS = {word: number for number, word in enumerate([*builders.SPECIAL, *builders.WORDS])}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Read-only: one model of each kind, pictures with one caption and with three."""
    place = tmp_path_factory.mktemp("seen")
    for kind in KINDS:
        builders.caption_checkpoint(place / kind, kind)
    builders.caption_folder(place / "one")
    builders.caption_folder(place / "three", captions=3)
    return place


def opened(model, data, cache, **fields):
    """(task, model in evaluation mode) on a folder's data."""
    import transformers

    recipe = Recipe(phases=(Phase(kind="dense", steps=1, lr=0.1),), data=str(data), **fields)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(model).eval()
    library = TransformersLibrary.open(model)
    return open_task(recipe, library, loaded, cache), loaded


def ids(text):
    return [WORDS[word] for word in text.split()]


# ---------------------------------------------------------------- BLEU


def sentences(rows, seed):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(builders.WORDS[:6], draw.integers(0, 9))) for _ in range(rows)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bleu_of_sums_is_sacrebleus(seed, order):
    rows = 1 + seed * 4
    written, wanted = sentences(rows, seed), [sentences(rows, seed + 100), sentences(rows, seed + 200)]
    scores = [row_score(references, text, 0.0, 1) for text, *references in zip(written, *wanted, strict=True)]
    stats = Scores.of(enumerate(scores), rows).stats
    expected = BLEU(max_ngram_order=order, force=True).corpus_score(written, wanted).score / 100
    assert float(bleu(stats.sum(0), order)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("text", ["", "nothing matches here", "the"])
def test_bleu_of_nothing_is_zero(text):
    assert bleu(np.asarray(row_score(["a dog"], text, 0.0, 1).stats)) == 0


@pytest.mark.parametrize("counts", [[1], [1, 1], [3, 3, 3], [2, 1], [1, 4, 2]])
def test_the_signature_is_sacrebleus_for_these_references_whatever_was_scored_before(counts):
    row_score(["a", "b", "c", "d", "e"], "a", 0.0, 1)
    width = max(counts)
    references = [[f"said {row}" if number < count else None for row, count in enumerate(counts)] for number in range(width)]
    metric = BLEU(max_ngram_order=4, force=True)
    metric.corpus_score(["said"] * len(counts), references)
    assert bleu_signature(counts) == metric.get_signature().format()


def test_a_captioner_killed_while_it_publishes_is_resumed_by_another_process(command, seen, tmp_path):
    from dsd_refine.run import publish

    def full(*_):
        raise OSError(28, "No space left on device", "somewhere")

    args = [seen / "vit-gpt2", "--data", seen / "three", *QUIET, "--control", "none", "-o"]
    assert command(*args, tmp_path / "whole").code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "copy_file", full)
        assert command(*args, tmp_path / "out").code == 5
    again = fresh(run_command, *args, tmp_path / "out", "--resume")
    assert again.returncode == 0, again.stderr
    same(tmp_path / "out", tmp_path / "whole")
    assert "nrefs:3|" in report_of(tmp_path / "out")["preprocessing"]["bleu"]


def test_bleu_takes_many_sums_at_once():
    stats = np.array([row_score([a], b, 0.0, 1).stats for a, b in zip(sentences(20, 1), sentences(20, 2), strict=True)])
    assert np.array_equal(bleu(stats.reshape(4, 5, -1)).reshape(-1), [bleu(one) for one in stats])


def two_arms(rows=60):
    """Statistics of captions, and of the same with every third one spoilt."""
    wanted = [f"{text} the a cat dog bird" for text in sentences(rows, 3)]
    spoilt = [text if row % 3 else "the a" for row, text in enumerate(wanted)]
    return tuple(
        np.array([row_score([a], b, 0.0, 1).stats for a, b in zip(wanted, arm, strict=True)]) for arm in (wanted, spoilt)
    )


def test_the_corpus_bootstrap_sees_a_difference_and_its_sign():
    good, bad = two_arms()
    better = compare(good, bad, np.ones(60), higher_is_better=True, corpus=bleu)
    assert better.delta == pytest.approx(float(bleu(good.sum(0)) - bleu(bad.sum(0))))
    assert better.test == "paired-bootstrap"
    assert better.p_value < 0.01
    assert 0 < better.ci95[0] < better.delta < better.ci95[1]
    worse = bootstrap_corpus(bad, good, bleu, higher_is_better=True)
    assert worse.delta == -better.delta
    assert worse.ci95 == pytest.approx((-better.ci95[1], -better.ci95[0]))
    none = bootstrap_corpus(good, good, bleu, higher_is_better=True)
    assert (none.delta, none.p_value) == (0.0, 1.0)
    assert none.ci95[0] == -none.ci95[1] < -0.05  # 60 rows cannot show that no other would change


def test_the_corpus_bootstrap_of_a_ratio_is_the_ratios():
    """With sum over sum as the metric it is the bootstrap of ratios, draw by draw."""
    draw = np.random.default_rng(0)
    first, second, count = draw.random(50), draw.random(50), draw.integers(1, 5, 50).astype(float)
    one, two = np.stack([first, count], 1), np.stack([second, count], 1)
    found = bootstrap_corpus(one, two, lambda sums: sums[..., 0] / sums[..., 1], higher_is_better=False, seed=4)
    wanted = compare(first, second, count, higher_is_better=False, seed=4)
    assert found.delta == pytest.approx(wanted.delta)
    assert found.ci95 == pytest.approx(wanted.ci95)
    assert found.p_value == wanted.p_value


def test_few_changed_rows_claim_little():
    good, bad = two_arms()
    few = good.copy()
    few[:4] = bad[:4]
    assert bootstrap_corpus(good, few, bleu, higher_is_better=True).p_value >= 0.5  # two rows of the four differ


def test_the_corpus_over_seeds():
    good, bad = two_arms()
    delta, ci95, deviation = corpus_over_seeds([good, good, bad], [bad] * 3, bleu, higher_is_better=True)
    each = [float(bleu(one.sum(0)) - bleu(bad.sum(0))) for one in (good, good, bad)]
    assert delta == pytest.approx(np.mean(each))
    assert deviation == pytest.approx(np.std(each, ddof=1))
    assert ci95[0] <= 0 < delta < ci95[1]


# ---------------------------------------------------------------- captions as the family trains on them


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("vit-gpt2", [2, *ids("a dog"), 3]),  # the tokenizer sets no end: a model that never sees one never stops
        ("vit-bert", [2, 2, *ids("a dog"), 3]),  # transformers' convention: what the tokenizer puts first is learned too
        ("blip", [2, *ids("a dog"), 3]),
        ("git", [2, *ids("a dog"), 3]),
    ],
)
def test_start_and_end(seen, tmp_path, kind, tokens):
    task, _ = opened(seen / kind, seen / "one", tmp_path / "cache")
    assert task.generator.tokens("a dog").tolist() == tokens
    assert task.generator.text([*ids("a dog"), 3, *ids("cat"), 0, 0]) == "a dog"


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_transformers_own(seen, tmp_path, kind):
    task, model = opened(seen / kind, seen / "one", tmp_path / "cache")
    batch = task.batch(task.train, [(unit, None) for unit in range(5)])
    tokens = [task.train.tokens[unit] for unit in range(5)]
    own = [one[1:] if kind.startswith("vit") else one for one in tokens]
    labels = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(one) for one in own], batch_first=True, padding_value=-100)
    if kind.startswith("vit"):
        inputs = {"labels": labels}
    else:
        inputs = {"input_ids": labels.clamp(min=0), "attention_mask": (labels >= 0).long(), "labels": labels}
    if kind == "blip":
        model.text_decoder.label_smoothing = 0.0
    with torch.no_grad():
        wanted = model(pixel_values=batch.inputs["pixel_values"], **inputs).loss
        found = task.loss(model, batch)
    assert batch.count == sum(len(one) - 1 for one in tokens)
    assert float(found) / batch.count == pytest.approx(float(wanted), rel=1e-5)
    assert task.logits(model, batch).shape == (batch.count, len(WORDS))


@pytest.mark.parametrize("kind", KINDS)
def test_what_fills_is_told_by_length_never_by_id(seen, tmp_path, kind):
    """A caption that holds the pad token's word, and an end that is the pad token, are targets like others."""
    task, model = opened(seen / kind, seen / "one", tmp_path / "cache")
    tokens = [np.array([2, 5, 0, 7, 3]), np.array([2, 5, 0])]
    part = type(task.train)(task.train.rows, np.array([0, 1]), tokens)
    together = task.batch(part, [(0, None), (1, None)])
    assert together.targets.tolist() == [[5, 0, 7, 3], [5, 0, -100, -100]]
    assert together.count == 6
    with torch.no_grad():
        alone = [task.score(model, task.batch(part, [(unit, None)]))[0].loss for unit in (0, 1)]
        both = [one.loss for one in task.score(model, together)]
    assert both == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_written_captions_are_transformers_greedy_ones(seen, tmp_path, kind):
    task, model = opened(seen / kind, seen / "one", tmp_path / "cache")
    batch = task.batch(task.eval, [(unit, None) for unit in range(6)])
    with torch.no_grad():
        scores = task.score(model, batch)
        found = model.generate(pixel_values=batch.inputs["pixel_values"], max_new_tokens=20, num_beams=1, do_sample=False)
        alone = [task.score(model, task.batch(task.eval, [(unit, None)]))[0].text for unit in range(6)]
    texts = task.generator.tokenizer.batch_decode(found, skip_special_tokens=True)
    assert [one.text for one in scores] == [" ".join(text.split()) for text in texts] == alone


def test_the_generation_config_of_the_folder_counts(seen, tmp_path):
    folder = builders.copy_folder(seen / "vit-bert", tmp_path / "m")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps(config | {"max_new_tokens": 5, "num_beams": 4, "do_sample": True})
    )
    task, model = opened(folder, seen / "one", tmp_path / "cache")
    assert task.generator.max_new_tokens == 5
    batch = task.batch(task.eval, [(0, None)])
    with torch.no_grad():
        texts = {task.score(model, batch)[0].text for _ in range(3)}
    assert len(texts) == 1
    assert len(texts.pop().split()) <= 5
    assert task.report()["preprocessing"]["max_new_tokens"] == 5


def test_max_length_cuts_captions_and_writing(seen, tmp_path):
    task, _ = opened(seen / "git", seen / "one", tmp_path / "cache", max_length=4)
    assert task.generator.max_new_tokens == 4
    assert {len(tokens) for tokens in task.train.tokens} == {5}
    assert any("captions fill or pass 4 tokens" in line for line in task.warnings)
    with pytest.raises(DataError, match="only 24 positions"):
        opened(seen / "git", seen / "one", tmp_path / "cache", max_length=25)


# ---------------------------------------------------------------- rows


def test_several_captions_are_units_of_one_row(seen, tmp_path):
    task, model = opened(seen / "vit-gpt2", seen / "three", tmp_path / "cache")
    assert len(task.eval.rows) == 12
    assert task.eval.units == 36
    assert [task.eval.row_of(unit) for unit in range(6)] == [0, 0, 0, 1, 1, 1]
    assert task.target(task.eval, 0).count("\n") == 2
    batch = task.batch(task.eval, [(unit, None) for unit in range(6)])
    assert batch.aside["final"].tolist() == [True, False, False, True, False, False]
    with torch.no_grad():
        scores = task.score(model, batch)
    assert [one.text is None for one in scores] == [False, True, True, False, True, True]
    assert scores[0].stats[:10] == row_score(batch.texts[0], scores[0].text, 0.0, 1).stats[:10]
    assert not task.batch(task.train, [(0, None)]).aside["final"].any()


def test_captions_of_one_picture_stay_in_one_part(seen, tmp_path):
    """A row for each caption: pictures are told by their content, so that none selects or judges what it trained."""
    builders.caption_folder(tmp_path / "d", splits=[])
    file = tmp_path / "d/metadata.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(
        "".join(json.dumps(one | {"text": f"{one['text']} {word}"}) + "\n" for one in lines for word in ("here", "now"))
    )
    task, _ = opened(seen / "git", tmp_path / "d", tmp_path / "cache", holdout=0.3)
    names = [{part.rows.name(row) for row in range(len(part.rows))} for part in (task.train, task.holdout, task.eval)]
    assert [len(part.rows) for part in (task.train, task.holdout, task.eval)] == [2 * len(one) for one in names]
    assert not names[0] & names[1]
    assert not names[0] & names[2]
    assert not names[1] & names[2]


def test_rows_without_picture_or_caption_are_skipped_and_named(seen, tmp_path):
    builders.caption_folder(tmp_path / "d")
    (tmp_path / "d/train/broken.png").write_bytes(b"no picture")
    odd = [("broken.png", "a cat"), ("gone.png", "a cat"), ("000.png", ""), ("001.png", None), ("002.png", [" ", "a  cat\n"])]
    with (tmp_path / "d/train/metadata.jsonl").open() as file:
        lines = [json.loads(line) for line in file]
    rows = [{**line, "text": [line["text"]]} for line in lines]
    rows += [{"file_name": name, "text": text if isinstance(text, list) else [text] if text else []} for name, text in odd]
    (tmp_path / "d/train/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    task, _ = opened(seen / "blip", tmp_path / "d", tmp_path / "cache", holdout=0.0, keep="last")
    reasons = {item["row"]: item["reason"] for item in task.train.rows.skipped}
    assert set(reasons) == {"train/broken.png", "train/gone.png", "train/000.png", "train/001.png"}
    assert "unreadable picture" in reasons["train/broken.png"]
    assert "unreadable file" in reasons["train/gone.png"]
    assert reasons["train/000.png"] == reasons["train/001.png"] == "no text"
    assert task.train.rows.texts[-1] == ("a cat",)


@pytest.mark.parametrize(("architecture", "kind"), [("LlavaForConditionalGeneration", "llava")])
def test_other_models_of_images_and_text_are_refused(tmp_path, architecture, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [architecture]}))
    with pytest.raises(CheckpointError, match=f"image-text-to-text is for idefics3, smolvlm; this is {kind}"):
        TransformersLibrary.open(tmp_path)
    with pytest.raises(CheckpointError, match=f"image-captioning is for vision-encoder-decoder, blip, git; this is {kind}"):
        TransformersLibrary.open(tmp_path, "image-captioning")


# ---------------------------------------------------------------- through the command


@pytest.fixture(scope="module")
def results(seen, tmp_path_factory):
    """OUT of a finished run of each kind: three captions a picture for VisionEncoderDecoder with GPT-2 and for GIT."""
    from dsd_refine.cli.app import main

    place = tmp_path_factory.mktemp("results")
    for kind in KINDS:
        data = seen / ("three" if kind in ("vit-gpt2", "git") else "one")
        args = [seen / kind, "--data", data, "-o", place / kind, *QUIET, "--sparse-steps", "30"]
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        assert ended.value.code == 0
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_bleu_can_be_counted_again(results, kind):
    report = report_of(results / kind)
    assert report["metric"] == {"name": "bleu4", "higher_is_better": True}
    table = pq.read_table(results / kind / "dsd/predictions.parquet").to_pydict()
    references = list(zip(*(target.split("\n") for target in table["target"]), strict=True))
    assert len(references) == (3 if kind in ("vit-gpt2", "git") else 1)
    for arm, found in report["arms"].items():
        assert list(found) == ["bleu4", "bleu3", "bleu2", "bleu1", "loss"]
        for order in (1, 2, 3, 4):
            score = BLEU(max_ngram_order=order, force=True).corpus_score(table[f"prediction_{arm}"], references).score
            assert found[f"bleu{order}"] == pytest.approx(score / 100, abs=1e-9)
        sums = np.sum(table[f"stats_{arm}"], axis=0)
        assert found["bleu4"] == pytest.approx(float(bleu(sums)))
        assert (sum(table[f"score_{arm}"]), sum(table[f"count_{arm}"])) == (sums[5], sums[9])
    delta = report["arms"]["refined"]["bleu4"] - report["arms"]["baseline"]["bleu4"]
    assert report["comparison"]["refined_vs_baseline"]["delta"] == pytest.approx(delta)
    assert report["arms"]["refined"]["loss"] < report["arms"]["baseline"]["loss"]


def test_the_holdout_selects_by_the_loss(results):
    report = report_of(results / "vit-gpt2")
    assert set(report["phases"][-1]["holdout"]) == {"loss"}
    lines = [json.loads(line) for line in (results / "vit-gpt2/dsd/log.jsonl").read_text().splitlines()]
    parts = {(line["part"], "bleu4" in line) for line in lines if line["event"] == "evaluation"}
    assert parts == {("holdout", False), ("eval", True)}


def test_captions_are_learned(results):
    """Thirty steps teach a model what all captions share; the words it writes are then some of them."""
    report = report_of(results / "blip")
    assert report["arms"]["refined"]["bleu1"] > report["arms"]["baseline"]["bleu1"]


@pytest.mark.parametrize("kind", KINDS)
def test_verify_and_plain_loading(command, seen, results, kind):
    import transformers

    assert command("verify", seen / kind, results / kind).code == 0
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(results / kind)
    assert type(loaded) is type(transformers.AutoModelForImageTextToText.from_pretrained(seen / kind))


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("vit-gpt2", "encoder.embeddings.patch_embeddings.projection.weight"),
        ("blip", "vision_model.embeddings.patch_embedding.weight"),
        ("git", "git.image_encoder.vision_model.embeddings.patch_embedding.weight"),
    ],
)
def test_the_patch_embedding_and_tables_are_not_masked(results, kind, first):
    layers = {layer["name"]: layer for layer in report_of(results / kind)["layers"]}
    assert layers[first]["excluded"] == "the first layer: it sees the input"
    free = [name for name, layer in layers.items() if layer["excluded"] is None]
    assert len(free) > 15
    assert not [name for name in free if "embedding" in name or "position" in name or "wte" in name]


@pytest.mark.parametrize("kind", ["vit-gpt2", "git"])
def test_stopped_and_resumed(command, seen, tmp_path, kind):
    one, two = ([seen / kind, "--data", seen / "three", "-o", tmp_path / name, *QUIET] for name in ("one", "two"))
    assert command(*one).code == 0
    for at in (2, 3):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, at)
            assert command(*two, "--resume").code == 4
    assert command(*two, "--resume").code == 0
    same(tmp_path / "one", tmp_path / "two")


def test_two_processes_are_one_of_twice_the_batch(command, tmp_path, seen):
    model = builders.caption_checkpoint(tmp_path / "m", "blip")
    args = [model, "--data", seen / "one", "--optimizer", "sgd", "--lr", "0.01", "--warmup-steps", "0", "--quiet",
            "--sparse-steps", 3, "--dense-steps", 2, "--gate", "none", "--device", "cpu"]  # fmt: skip
    two = two_processes(*args, "-o", tmp_path / "two", "--batch-size", 3)
    assert two.returncode == 0, two.stderr
    assert command(*args, "-o", tmp_path / "one", "--batch-size", 6).code == 0
    near(tmp_path / "one", tmp_path / "two")
    tables = [pq.read_table(tmp_path / name / "dsd/predictions.parquet").to_pydict() for name in ("one", "two")]
    assert tables[0]["prediction_refined"] == tables[1]["prediction_refined"]


def test_the_papers_recipe_freezes_the_encoder(command, seen, tmp_path):
    found = command(
        seen / "vit-gpt2", "--data", seen / "one", "-o", tmp_path / "out", *SHORT, "--quiet", "--recipe", "captioning"
    )
    assert found.code == 0, found.err
    report = report_of(tmp_path / "out")
    assert [phase["sparsity"] for phase in report["phases"] if phase["arm"] == "refined"] == [0.8, None]
    source, written = (load_file(folder / "model.safetensors") for folder in (seen / "vit-gpt2", tmp_path / "out"))
    changed = {name.split(".")[0] for name in source if not torch.equal(source[name], written[name])}
    assert changed == {"decoder"}
    reasons = {layer["name"]: layer["excluded"] for layer in report["layers"] if layer["name"].startswith("encoder.")}
    assert all(reasons.values())


def test_seeds_and_plan(command, seen, tmp_path):
    args = [seen / "vit-bert", "--data", seen / "one"]
    found = command(*args, "-o", tmp_path / "out", *QUIET, "--seeds", 2)
    assert found.code == 0, found.err
    seeds = report_of(tmp_path / "out")["seeds"]
    values = seeds["arms"]["refined"]["bleu4"]["values"]
    baseline = report_of(tmp_path / "out")["arms"]["baseline"]["bleu4"]
    assert seeds["comparison"]["refined_vs_baseline"]["delta"] == pytest.approx(np.mean(values) - baseline)
    found = command("plan", *args, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["totals"]["rows"].endswith("12 evaluation")
