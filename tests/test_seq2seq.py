"""seq2seq-lm: pairs of texts as each family reads them, texts as its generation config writes them, scores of known packages."""

import json

import builders
import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SHORT, hashes
from outputs import near, report_of, same
from pairs import LANGUAGES, pairs, pairs_file, seq2seq_checkpoint, write_lines
from runs import stop_after, two_processes
from sacrebleu.metrics import BLEU, CHRF
from tasks import open_task

from dsd_refine.checkpoint.libraries.transformers import TransformersLibrary
from dsd_refine.errors import DataError
from dsd_refine.evidence.compare import bootstrap_corpus
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.tasks.base import Scores
from dsd_refine.tasks.seq2seq_lm import chrf_of
from dsd_refine.tasks.text_metrics import ROUGE, bleu_sums, chrf, chrf_sums, rouge_scores

FAMILIES = ("t5", "bart", "marian", "nllb", "mbart")
QUIET = (*SHORT, "--quiet", "--lr", "0.01", "--warmup-steps", "0", "--control", "none")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Read-only: one model of each family, and pairs."""
    place = tmp_path_factory.mktemp("seen")
    for family in FAMILIES:
        seq2seq_checkpoint(place / family, family)
    pairs_file(place / "d.jsonl")
    return place


def opened(model, data, cache, **fields):
    """(task, model in evaluation mode) on these data."""
    import transformers

    recipe = Recipe(phases=(Phase(kind="dense", steps=1, lr=0.1),), data=str(data), **fields)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    return open_task(recipe, TransformersLibrary.open(model), loaded, cache), loaded


def first(task, units=4):
    return task.batch(task.eval, [(unit, None) for unit in range(units)])


def settings_of(folder, **changed):
    """Write settings into the folder's generation_config.json."""
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    return folder


# ---------------------------------------------------------------- what each family reads and writes


@pytest.mark.parametrize(
    ("family", "begins", "labels"),
    [
        ("t5", "<pad>", "▁ao ▁taco </s>"),
        ("bart", "[SEP]", "[CLS] ao taco [SEP]"),
        ("marian", "<pad>", "▁ao ▁taco </s>"),
        ("nllb", "</s>", "deu_Latn ▁ a o ▁ t a c o </s>"),
        ("mbart", "de_DE", "▁ao ▁taco </s> de_DE"),
    ],
)
def test_each_family_begins_and_ends_as_its_training_does(seen, tmp_path, family, begins, labels):
    data = write_lines(tmp_path / "d.jsonl", [{"source": "a cat", "target": "ao taco"}, *pairs(20)])
    task, model = opened(seen / family, data, tmp_path / "cache", holdout=0.0, keep="last")
    names = task.writer.tokenizer.convert_ids_to_tokens
    rows = ((part, unit) for part in (task.train, task.eval) for unit in range(part.units))
    part, unit = next((part, unit) for part, unit in rows if task.target(part, unit) == "ao taco")
    batch = task.batch(part, [(unit, None)])
    assert names(batch.targets[0].tolist()) == labels.split()
    assert names(batch.inputs["decoder_input_ids"][0].tolist()) == [begins, *labels.split()[:-1]]
    with torch.no_grad():
        wanted = model(**{name: batch.inputs[name] for name in ("input_ids", "attention_mask")}, labels=batch.targets).loss
        assert float(task.loss(model, batch)) / batch.count == pytest.approx(float(wanted), rel=1e-5)
    assert task.logits(model, batch).shape == (batch.count, model.config.vocab_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_the_batch_and_texts_are_transformers_own(seen, tmp_path, family):
    task, model = opened(seen / family, seen / "d.jsonl", tmp_path / "cache")
    batch = first(task)
    with torch.no_grad():
        together = task.score(model, batch)
        alone = [task.score(model, task.batch(task.eval, [(unit, None)]))[0] for unit in range(4)]
        forced = {"forced_bos_token_id": task.writer.generation.forced_bos_token_id}
        own = [
            model.generate(
                **{
                    name: value
                    for name, value in task.batch(task.eval, [(unit, None)]).inputs.items()
                    if not name.startswith("decoder")
                },
                **forced,
            )
            for unit in range(4)
        ]
    assert [one.loss for one in together] == pytest.approx([one.loss for one in alone], rel=1e-5)
    assert [one.text for one in together] == [one.text for one in alone]
    texts = [task.writer.tokenizer.decode(ids[0].tolist(), skip_special_tokens=True) for ids in own]
    assert [one.text for one in together] == [" ".join(text.split()) for text in texts]


def test_what_fills_is_told_by_length_never_by_id(seen, tmp_path):
    """A target that holds the pad token's id is a target like others."""
    task, model = opened(seen / "bart", seen / "d.jsonl", tmp_path / "cache")
    labels = [np.array([2, 5, 0, 7, 3], dtype=np.int32), np.array([2, 0, 0], dtype=np.int32)]
    shifted = [np.array([3, *ids[:-1]], dtype=np.int32) for ids in labels]
    part = type(task.eval)(task.eval.rows, labels, shifted, task.eval.sources[:2])
    together = task.batch(part, [(0, None), (1, None)])
    assert together.targets.tolist() == [[2, 5, 0, 7, 3], [2, 0, 0, -100, -100]]
    assert together.count == 8
    with torch.no_grad():
        alone = [task.score(model, task.batch(part, [(unit, None)]))[0].loss for unit in (0, 1)]
        assert [one.loss for one in task.score(model, together)] == pytest.approx(alone, rel=1e-5)


def test_the_generation_config_of_the_folder_counts_but_for_sampling(seen, tmp_path):
    model = settings_of(builders.copy_folder(seen / "marian", tmp_path / "m"), num_beams=3, do_sample=True, max_length=6)
    task, loaded = opened(model, seen / "d.jsonl", tmp_path / "cache")
    with torch.no_grad():
        texts = [[one.text for one in task.score(loaded, first(task))] for _ in range(2)]
    assert texts[0] == texts[1]
    assert task.report()["preprocessing"]["generation"] == {"sampling": False, "num_beams": 3, "max_length": 6}


def test_without_a_limit_as_many_tokens_are_written_as_the_longest_target_has(seen, tmp_path):
    task, _ = opened(
        settings_of(builders.copy_folder(seen / "t5", tmp_path / "m"), max_length=None), seen / "d.jsonl", tmp_path / "c"
    )
    longest = max(len(ids) for part in (task.train, task.eval) for ids in part.labels)
    assert task.writer.generation.max_new_tokens == longest
    task, _ = opened(seen / "t5", seen / "d.jsonl", tmp_path / "c", max_length=4)
    assert (task.writer.generation.max_new_tokens, task.writer.generation.max_length) == (4, None)
    assert max(map(len, task.train.labels)) == max(map(len, task.train.sources)) == 4
    assert {int(ids[-1]) for ids in task.train.labels} == {1}  # the end stays
    assert sum("are longer than 4 tokens: they are cut" in line for line in task.warnings) == 2


# ---------------------------------------------------------------- languages and prefixes


def test_languages_come_from_the_recipe_the_columns_or_the_checkpoint(seen, tmp_path):
    task, _ = opened(seen / "nllb", seen / "d.jsonl", tmp_path / "c")
    assert task.settings == {"source_language": "eng_Latn", "target_language": "deu_Latn"}
    assert not [line for line in task.warnings if "generation_config" in line]
    fields = {"source_language": "deu_Latn", "target_language": "fra_Latn"}
    task, _ = opened(seen / "nllb", seen / "d.jsonl", tmp_path / "c", **fields)
    assert task.settings == fields
    ids = task.writer.tokenizer.get_vocab()
    assert {int(labels[0]) for labels in task.train.labels} == {ids["fra_Latn"]} == {task.writer.generation.forced_bos_token_id}
    assert {int(source[0]) for source in task.train.sources} == {ids["deu_Latn"]}
    assert any("begins texts with deu_Latn, the targets are fra_Latn" in line for line in task.warnings)
    data = pairs_file(tmp_path / "d.jsonl", names=(LANGUAGES[2], LANGUAGES[0]))
    task, _ = opened(seen / "nllb", data, tmp_path / "c", source_column="fra_Latn", target_column="eng_Latn")
    assert task.settings == {"source_language": "fra_Latn", "target_language": "eng_Latn"}
    task, _ = opened(seen / "mbart", seen / "d.jsonl", tmp_path / "c", target_language="fr_XX")
    french = task.writer.tokenizer.get_vocab()["fr_XX"]
    assert {int(of[0]) for of in task.train.shifted} == {french} == {task.writer.generation.decoder_start_token_id}


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("nllb", {"target_language": "klingon"}, "knows no language 'klingon'; it knows some such as"),
        ("nllb", {"target_language": "</s>"}, "knows no language"),
        ("t5", {"target_language": "de"}, "not one for several languages: leave it out"),
        ("t5", {"metric": "wer"}, "seq2seq-lm is measured by chrf, bleu, exact_match, rouge1"),
        ("bart", {"max_length": 41}, "the model has only 40 positions"),
        ("t5", {"normalizer": "basic"}, "normalizer: seq2seq-lm has no use for it"),
        ("t5", {"text_column": "source"}, "--text-column: seq2seq-lm reads columns of source and target"),
    ],
)
def test_what_cannot_be_used_is_refused(seen, tmp_path, family, fields, message):
    with pytest.raises(DataError, match=message):
        opened(seen / family, seen / "d.jsonl", tmp_path / "c", **fields)


def test_a_model_for_several_languages_must_know_which_one_it_writes(seen, tmp_path):
    model = settings_of(builders.copy_folder(seen / "nllb", tmp_path / "m"), forced_bos_token_id=None)
    file = model / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("src_lang", "tgt_lang")}
    file.write_text(json.dumps(config))
    with pytest.raises(DataError, match="which one the targets are in: give --set target_language=NAME"):
        opened(model, seen / "d.jsonl", tmp_path / "c")
    task, _ = opened(model, seen / "d.jsonl", tmp_path / "c", target_language="deu_Latn")
    assert any("does not say of what language the sources are: they are read as eng_Latn" in line for line in task.warnings)


def test_prefixes_are_those_of_the_config_for_these_columns(tmp_path):
    known = {"translation_en_to_de": {"prefix": "the large "}, "summarization": {"prefix": "a small "}}
    model = seq2seq_checkpoint(tmp_path / "m", "t5", task_specific_params=known)
    plain = pairs_file(tmp_path / "plain.jsonl")
    summaries = pairs_file(tmp_path / "s.jsonl", names=("article", "highlights"))
    translations = pairs_file(tmp_path / "t.jsonl", names=("en", "de"))

    def prefix(data, **fields):
        task, _ = opened(model, data, tmp_path / "c", **fields)
        begin = task.writer.tokenizer.convert_ids_to_tokens(task.train.sources[0].tolist())[:2]
        return begin, task.settings.get("prefix"), [line for line in task.warnings if "prefix" in line]

    assert prefix(summaries) == (["▁a", "▁small"], "a small ", [])
    both = {"source_column": "en", "target_column": "de"}
    assert prefix(translations, **both) == (["▁the", "▁large"], "the large ", [])
    assert prefix(translations, **both, prefix="")[1:] == (None, [])
    assert prefix(plain, prefix="new ")[:2] == (["▁new", prefix(plain)[0][0]], "new ")
    assert "knows prefixes of sources ('a small ', 'the large '), and none for these columns" in prefix(plain)[2][0]


# ---------------------------------------------------------------- columns and rows


@pytest.mark.parametrize(
    "names",
    [
        ("source", "target"),
        ("input", "output"),
        ("article", "summary"),
        ("Article", "Highlights"),
        ("document", "summary"),
        ("src", "tgt"),
    ],
)
def test_known_columns_are_found(command, seen, tmp_path, names):
    data = pairs_file(tmp_path / "d.jsonl", names=names)
    found = command("plan", seen / "t5", "--data", data, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["data"]["columns"] == {"source": names[0], "target": names[1]}


@pytest.mark.parametrize("form", ["jsonl", "saved"])
def test_a_column_of_translations_needs_a_direction(refused, seen, tmp_path, form):
    rows = [{"translation": {"en": row["source"], "de": row["target"]}} for row in pairs(24)]
    if form == "jsonl":
        data = write_lines(tmp_path / "d.jsonl", rows)
    else:
        kind = datasets.Features({"translation": datasets.Translation(languages=("en", "de"))})
        datasets.Dataset.from_list(rows, kind).save_to_disk(tmp_path / "d")
        data = tmp_path / "d"
    said = refused(seen / "t5", "--data", data, *QUIET)
    assert "; the data has " in said
    assert said.endswith("Say which text is for which: --set source_column=NAME --set target_column=NAME")
    for source, target in (("en", "de"), ("de", "en")):
        task, _ = opened(seen / "t5", data, tmp_path / "c", source_column=source, target_column=target)
        assert all(text.split()[0].endswith("o") == (target == "de") for (text,) in task.train.rows.texts)


def test_columns_that_could_be_meant_twice_are_refused(refused, seen, tmp_path):
    rows = [{"article": row["source"], "text": row["source"], "summary": row["target"]} for row in pairs(24)]
    said = refused(seen / "t5", "--data", write_lines(tmp_path / "d.jsonl", rows), *QUIET)
    assert "article and text could each be the source column: name the one that is meant with --set source_column=NAME" in said
    same_column = ("--set", "source_column=text", "--set", "target_column=text")
    said = refused(seen / "t5", "--data", tmp_path / "d.jsonl", *QUIET, *same_column)
    assert "the column 'text' would be read as" in said


def test_rows_that_cannot_be_used_are_skipped_and_named(seen, tmp_path):
    rows = [*pairs(20), {"source": " ", "target": "ao"}, {"source": "a", "target": ""}, {"source": "a", "target": None}]
    task, _ = opened(seen / "t5", write_lines(tmp_path / "d.jsonl", rows), tmp_path / "c", holdout=0.0, keep="last")
    assert {item["row"]: item["reason"] for item in task.train.rows.skipped} == {
        20: "no source text",
        21: "no target text",
        22: "no target text",
    }


def test_equal_sources_stay_in_one_part_whatever_their_targets(seen, tmp_path):
    rows = [{"source": row["source"], "target": f"{row['target']}{more}"} for row in pairs(20) for more in ("", " ao")]
    task, _ = opened(seen / "t5", write_lines(tmp_path / "d.jsonl", rows), tmp_path / "c", holdout=0.2)
    contents = [set(part.rows.digests) for part in (task.train, task.holdout, task.eval)]
    assert not contents[0] & contents[1]
    assert not (contents[0] | contents[1]) & contents[2]


# ---------------------------------------------------------------- metrics


def sentences(rows, seed):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(builders.WORDS[:8], draw.integers(0, 9))) for _ in range(rows)]


@pytest.mark.parametrize("seed", range(8))
def test_chrf_of_sums_is_sacrebleus(seed):
    written, wanted = sentences(1 + 3 * seed, seed), [text + "é!" for text in sentences(1 + 3 * seed, seed + 50)]
    if seed == 0:
        written, wanted = ["ab"], ["abc d"]  # shorter than the highest order
    sums = np.sum([chrf_sums(a, b) for a, b in zip(wanted, written, strict=True)], axis=0)
    assert float(chrf(sums)) == pytest.approx(CHRF().corpus_score(written, [wanted]).score / 100, abs=1e-9)
    each = [float(chrf(np.asarray(chrf_sums(a, b)))) for a, b in zip(wanted, written, strict=True)]
    assert each == pytest.approx([CHRF().sentence_score(b, [a]).score / 100 for a, b in zip(wanted, written, strict=True)])


def test_the_bootstrap_of_chrf_sees_a_difference_and_its_sign():
    wanted = [f"{text} cat" for text in sentences(60, 1)]
    spoilt = [text if row % 3 else "the a" for row, text in enumerate(wanted)]
    good, bad = (
        np.array([(*bleu_sums([a], b), *chrf_sums(a, b), 0, 1, 1) for a, b in zip(wanted, arm, strict=True)])
        for arm in (wanted, spoilt)
    )
    found = bootstrap_corpus(good, bad, chrf_of, higher_is_better=True)
    assert found.p_value < 0.01 < found.ci95[0]
    assert found.delta == pytest.approx(1 - float(chrf_of(bad.sum(0))))


def test_rouge_is_rouge_scores_own():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    for a, b, c in zip(sentences(6, 1), sentences(6, 2), sentences(6, 3), strict=True):
        each = [scorer.score(reference, b) for reference in (a, c)]
        wanted = [max(found[name].fmeasure for found in each) for name in ROUGE]
        assert rouge_scores([a, c], b) == pytest.approx(wanted)


def test_rougelsum_reads_sentence_by_sentence():
    from rouge_score.rouge_scorer import RougeScorer

    reference, text = "the cat eats. a dog sees! now and then", "a dog sees! the cat eats. now"
    own = RougeScorer(["rougeLsum"], use_stemmer=True)
    lines = [one.replace(". ", ".\n").replace("! ", "!\n") for one in (reference, text)]
    found = dict(zip(ROUGE, rouge_scores([reference], text), strict=True))
    assert found["rougeLsum"] == pytest.approx(own.score(*lines)["rougeLsum"].fmeasure)
    assert found["rougeLsum"] > found["rougeL"]


def test_several_right_targets_train_with_the_first_and_judge_with_all(seen, tmp_path):
    rows = [
        {**row, "target": [row["target"], f"{row['target']} {word}"]}
        for row, word in zip(pairs(24), builders.WORDS, strict=False)
    ]
    rows[3]["target"] = []
    data = write_lines(tmp_path / "d.jsonl", rows)
    task, model = opened(seen / "t5", data, tmp_path / "c", holdout=0.0, keep="last", metric="rougeLsum")
    with torch.no_grad():
        scores = Scores.of(enumerate(task.score(model, first(task))), 4)
    references = list(zip(*task.eval.rows.texts[:4], strict=True))
    found = task.metrics(scores)
    assert found["bleu"] == pytest.approx(BLEU(force=True).corpus_score(scores.text, references).score / 100, abs=1e-9)
    assert found["chrf"] == pytest.approx(CHRF().corpus_score(scores.text, references).score / 100, abs=1e-9)
    assert "nrefs:2" in task.report()["preprocessing"]["chrf"]
    assert task.target(task.eval, 0) == "\n".join(task.eval.rows.texts[0])
    unit = task.train.rows.numbers.tolist().index(0) if 0 in task.train.rows.numbers else 0
    text = task.writer.tokenizer.decode(task.train.labels[unit], skip_special_tokens=True)
    assert " ".join(text.split()) == task.train.rows.texts[unit][0]
    assert [item["reason"] for part in (task.train, task.eval) for item in part.rows.skipped] == ["no target text"]


@pytest.mark.parametrize("metric", ["chrf", "bleu", "exact_match", "rougeL", "loss"])
def test_each_metric_can_decide(seen, tmp_path, metric):
    task, model = opened(seen / "marian", seen / "d.jsonl", tmp_path / "c", metric=metric)
    model.generate = None if metric == "loss" else model.generate  # nothing is written for the loss
    with torch.no_grad():
        rows = task.score(model, first(task))
        holdout = task.score(model, task.batch(task.holdout, [(0, None)]))
    scores = Scores.of(enumerate(rows), 4)
    found = task.metrics(scores)
    assert next(iter(found)) == task.metric == metric
    assert set(task.metrics(Scores.of(enumerate(holdout), 1))) == {"loss"}  # the holdout selects by the loss
    if metric == "loss":
        assert scores.text is None
    if task.corpus is None:
        assert found[metric] == pytest.approx(scores.score.sum() / scores.count.sum())
    else:
        assert found[metric] == pytest.approx(float(task.corpus(scores.stats.sum(0))))


# ---------------------------------------------------------------- through the command


@pytest.fixture(scope="module")
def result(seen, tmp_path_factory):
    """OUT of a finished run of Marian."""
    from runs import whole

    out = tmp_path_factory.mktemp("result") / "out"
    return whole([seen / "marian", "--data", seen / "d.jsonl", *QUIET, "--sparse-steps", "12", "-o", out])


def test_the_command_refines_a_translator_and_its_figures_can_be_counted_again(command, seen, result):
    report = report_of(result)
    assert (report["task"], report["metric"]["name"]) == ("seq2seq-lm", "chrf")
    assert report["data"]["columns"] == {"source": "source", "target": "target"}
    assert set(report["phases"][-1]["holdout"]) == {"loss"}
    table = pq.read_table(result / "dsd/predictions.parquet").to_pydict()
    for arm, found in report["arms"].items():
        written, wanted = table[f"prediction_{arm}"], [table["target"]]
        assert list(found) == ["chrf", "bleu", "exact_match", "loss"]
        assert found["chrf"] == pytest.approx(CHRF().corpus_score(written, wanted).score / 100, abs=1e-9)
        assert found["bleu"] == pytest.approx(BLEU(force=True).corpus_score(written, wanted).score / 100, abs=1e-9)
        stats = np.array(table[f"stats_{arm}"])
        assert found["loss"] == pytest.approx(sum(table[f"loss_{arm}"]) / stats[:, -1].sum())
    assert report["arms"]["refined"]["loss"] < report["arms"]["baseline"]["loss"]
    assert report["comparison"]["refined_vs_baseline"]["test"] == "paired-bootstrap"
    assert command("verify", seen / "marian", result).code == 0
    mine, theirs = hashes(result), hashes(seen / "marian")
    assert all(mine[name] == theirs[name] for name in theirs if name != "model.safetensors")  # spm pair, generation_config.json


def test_embeddings_shared_by_both_sides_and_the_head_are_one_and_not_masked(result):
    layers = {layer["name"]: layer for layer in report_of(result)["layers"]}
    assert layers["model.shared.weight"]["excluded"].startswith("embedding")
    free = [name for name, layer in layers.items() if layer["excluded"] is None]
    assert {name.split(".")[1] for name in free} == {"encoder", "decoder"}
    assert not [name for name in free if "embed" in name]


def test_stopped_and_resumed(command, seen, result, tmp_path):
    args = [seen / "marian", "--data", seen / "d.jsonl", *QUIET, "--sparse-steps", "12", "-o", tmp_path / "two"]
    for at in (5, 8):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, at)
            assert command(*args, "--resume").code == 4
    assert command(*args, "--resume").code == 0
    same(result, tmp_path / "two")


def test_two_processes_are_one_of_twice_the_batch(command, seen, tmp_path):
    args = [seen / "t5", "--data", seen / "d.jsonl", "--optimizer", "sgd", "--lr", "0.01", "--warmup-steps", "0", "--quiet",
            "--sparse-steps", 3, "--dense-steps", 2, "--gate", "none", "--device", "cpu", "--control", "none"]  # fmt: skip
    two = two_processes(*args, "-o", tmp_path / "two", "--batch-size", 3)
    assert two.returncode == 0, two.stderr
    assert command(*args, "-o", tmp_path / "one", "--batch-size", 6).code == 0
    near(tmp_path / "one", tmp_path / "two")
    tables = [pq.read_table(tmp_path / name / "dsd/predictions.parquet").to_pydict() for name in ("one", "two")]
    assert tables[0]["prediction_refined"] == tables[1]["prediction_refined"]
