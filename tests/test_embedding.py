"""embedding: checkpoints in sentence-transformers' layout, on texts that belong together and on pairs with a score."""

import json

import builders
import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SHORT, hashes
from embedders import NEWER, OLD_MEAN, embedder_checkpoint, encoder_checkpoint, save_json, together_file, together_rows
from heads import scored_file, write
from outputs import near, report_of, same
from runs import stop_after, two_processes
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr

from dsd_refine.checkpoint.sentence_layout import SentenceLayout, read_sentence_layout
from dsd_refine.evidence.compare import compare
from dsd_refine.tasks.base import Score
from dsd_refine.tasks.embedding_pairs import Together
from dsd_refine.tasks.inputs.sentences import SentenceInputs, embeddings, prompts_of
from dsd_refine.tasks.sentence_rows import SentencePart
from dsd_refine.tasks.text_scores import SPEARMAN

QUIET = (*SHORT, "--batch-size", "4", "--control", "none", "--quiet")
SIDES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json")
PROMPTS = {"prompts": {"query": "the cat ", "document": "a dog "}, "default_prompt_name": None}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models and rows that tests read only."""
    folder = tmp_path_factory.mktemp("embedding")
    embedder_checkpoint(folder / "model")
    embedder_checkpoint(folder / "dense", steps=("Dense", "Normalize"), settings=PROMPTS)
    together_file(folder / "pairs.jsonl")
    together_file(folder / "triplets.jsonl", names=("anchor", "positive"), negative=True)
    scored_file(folder / "scored.jsonl")
    return folder


def run(command, model, data, out, *more):
    found = command(model, "--data", data, "-o", out, *QUIET, *more)
    assert found.code == 0, found.err
    return report_of(out)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def encoded(model, texts, prompt=""):
    """What sentence-transformers makes of texts. Skips where it is not installed."""
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(model), device="cpu").encode(texts, prompt=prompt, convert_to_numpy=True)


def ndcg(similar, right):
    """nDCG@10 by its definition: `similar` to each passage, of which those at `right` are right."""
    order = np.argsort(-similar, kind="stable")[:10]
    gain = sum(1 / np.log2(place + 2) for place, passage in enumerate(order) if passage in right)
    return gain / sum(1 / np.log2(place + 2) for place in range(min(10, len(right))))


def test_the_command_refines_pairs_and_sentence_transformers_gives_its_figures(command, place, tmp_path):
    report = run(command, place / "dense", place / "pairs.jsonl", tmp_path / "out")
    assert (report["task"], report["metric"]["name"]) == ("embedding", "ndcg_at_10")
    assert report["data"]["columns"] == {"text": "query,passage"}
    assert "SentenceTransformer(" in (tmp_path / "out/README.md").read_text()
    shown = report["preprocessing"]
    assert shown["modules"] == "mean pooling, dense 32 to 24, normalize"
    assert shown["prompts"] == {"query": "the cat ", "passage": "a dog "}
    assert command("verify", place / "dense", tmp_path / "out").code == 0
    before, after = hashes(place / "dense"), hashes(tmp_path / "out")
    for name in (*SIDES, "2_Dense/config.json", "2_Dense/model.safetensors"):
        assert before[name] == after[name]
    assert before["model.safetensors"] != after["model.safetensors"]
    reasons = {layer["name"]: layer["excluded"] for layer in report["layers"]}
    assert reasons["pooler.dense.weight"] is not None  # the loss does not reach it
    assert reasons["encoder.layer.0.output.dense.weight"] is None
    table = pq.read_table(tmp_path / "out/dsd/predictions.parquet").to_pydict()
    assert report["arms"]["refined"]["ndcg_at_10"] == pytest.approx(np.mean(table["score_refined"]))
    rows = [rows_of(place / "pairs.jsonl")[int(row)] for row in table["row"]]
    queries = encoded(tmp_path / "out", [row["query"] for row in rows], "the cat ")
    passages = encoded(tmp_path / "out", [row["passage"] for row in rows], "a dog ")
    wanted = [ndcg(passages @ query, {place}) for place, query in enumerate(queries)]
    assert table["score_refined"] == pytest.approx(wanted)


def test_scored_pairs_and_sentence_transformers_gives_the_cosines(command, place, tmp_path):
    report = run(command, place / "model", place / "scored.jsonl", tmp_path / "out")
    assert report["metric"]["name"] == "spearman"
    assert report["comparison"]["refined_vs_baseline"]["test"] == "paired-bootstrap"
    table = pq.read_table(tmp_path / "out/dsd/predictions.parquet").to_pydict()
    x, y = ([float(value) for value in table[name]] for name in ("prediction_refined", "target"))
    figures = report["arms"]["refined"]
    assert figures["spearman"] == pytest.approx(spearmanr(x, y).statistic)
    assert figures["pearson"] == pytest.approx(pearsonr(x, y).statistic, abs=1e-5)
    assert figures["mse"] == pytest.approx(np.mean((np.array(x) - y) ** 2), abs=1e-5)
    rows = [rows_of(place / "scored.jsonl")[int(row)] for row in table["row"]]
    one, other = (encoded(tmp_path / "out", [row[name] for row in rows]) for name in ("sentence1", "sentence2"))
    assert x == pytest.approx((one * other).sum(1), abs=1e-5)


def test_an_embedding_model_learns(command, place, tmp_path):
    together_file(tmp_path / "d.jsonl", rows=200)
    steps = ("--sparse-steps", 40, "--dense-steps", 20, "--lr", "1e-3", "--warmup-steps", 0, "--batch-size", 16)
    report = run(command, place / "model", tmp_path / "d.jsonl", tmp_path / "out", *steps)
    assert report["arms"]["refined"]["ndcg_at_10"] > report["arms"]["baseline"]["ndcg_at_10"]
    assert report["arms"]["refined"]["loss"] < report["arms"]["baseline"]["loss"]


@pytest.mark.parametrize("data", ["triplets.jsonl", "scored.jsonl"])
def test_stopped_and_resumed(command, place, tmp_path, data):
    one, two = ([place / "model", "--data", place / data, "-o", tmp_path / name, *QUIET] for name in ("one", "two"))
    assert command(*one).code == 0
    for at in (2, 2):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, at)
            assert command(*two, "--resume").code == 4
    assert command(*two, "--resume").code == 0
    same(tmp_path / "one", tmp_path / "two")


def test_two_processes_are_one_of_twice_the_batch(command, place, tmp_path):
    """The negatives of a row are those of all processes; 26 training rows leave one process without a row."""
    still = embedder_checkpoint(tmp_path / "m", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    args = [still, "--data", place / "triplets.jsonl", "--optimizer", "sgd", "--lr", "0.1", "--warmup-steps", "0", "--quiet",
            "--control", "none", "--sparse-steps", 5, "--dense-steps", 3, "--gate", "none", "--device", "cpu"]  # fmt: skip
    two = two_processes(*args, "-o", tmp_path / "two", "--batch-size", 3)
    assert two.returncode == 0, two.stderr
    assert command(*args, "-o", tmp_path / "one", "--batch-size", 6).code == 0
    near(tmp_path / "one", tmp_path / "two")
    one, two = (report_of(tmp_path / name) for name in ("one", "two"))
    assert one["phases"][0]["loss_last"] == pytest.approx(two["phases"][0]["loss_last"], rel=1e-4)
    assert one["arms"]["refined"] == pytest.approx(two["arms"]["refined"], rel=1e-4)


def test_figures_do_not_depend_on_the_batch(command, place, tmp_path):
    none = ("--sparse-steps", 0, "--dense-steps", 0, "--sparsity", 0)
    reports = [
        run(command, place / "model", place / "pairs.jsonl", tmp_path / f"{size}", *none, "--batch-size", size)
        for size in (2, 5)
    ]
    assert reports[0]["arms"]["baseline"] == pytest.approx(reports[1]["arms"]["baseline"], rel=1e-5)


def test_accumulation_is_refused_with_its_reason(refused, command, place, tmp_path):
    how = (*QUIET, "-o", tmp_path / "out", "--gradient-accumulation-steps", 2)
    said = refused(place / "model", "--data", place / "pairs.jsonl", *how)
    assert "a row's negatives are the other rows of its micro-batch" in said
    plan = ("plan", place / "model", "--data", place / "scored.jsonl", "--gradient-accumulation-steps", 2)
    assert command(*plan).code == 0  # a sum over rows


# ---------------------------------------------------------------- the loss and the figures


class Embedder(Together):
    """The pairs' task without a model."""

    def __init__(self, metric="ndcg_at_10", columns=("a", "b")):
        self.sentences = SentenceInputs(None, 16, None, SentenceLayout(("mean",)))
        self.metric, self.columns = metric, columns


def test_a_passage_that_is_right_elsewhere_is_no_negative():
    vectors = torch.nn.functional.normalize(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    # row 1 has the passage of row 0, row 2 the query of row 0, and the passage of row 3 is the query of row 0
    texts = torch.tensor([[0, 10], [1, 10], [0, 12], [3, 0]])
    found = Embedder()._losses(vectors, texts)
    logits = 20 * vectors[0] @ vectors[1].T
    plain = torch.nn.functional.cross_entropy
    assert found[0] == pytest.approx(float(plain(logits[0, [0]][None], torch.tensor([0]))), abs=1e-5)  # nothing is left
    assert found[1] == pytest.approx(float(plain(logits[1, [1, 2, 3]][None], torch.tensor([0]))), abs=1e-5)
    assert found[3] == pytest.approx(float(plain(logits[3][None], torch.tensor([3]))), abs=1e-5)


def test_ndcg_is_that_of_its_definition():
    draw = np.random.default_rng(0)
    texts = np.array([[query, 100 + draw.integers(0, 30)] for query in range(20) for _ in range(2)])
    vectors = draw.normal(size=(40, 2, 6)).astype(np.float32)
    vectors[:, 0] = vectors[::2, 0].repeat(2, 0)  # a query has one embedding
    of_text = {number: draw.normal(size=6) for number in texts[:, 1]}
    vectors[:, 1] = [of_text[number] for number in texts[:, 1]]
    part = SentencePart(range(40), texts)
    found = Embedder().together(part, range(40), [Score(0.0, 1, 0.0, vectors=row) for row in vectors])
    passages = sorted(of_text)
    every = np.stack([of_text[number] for number in passages]).astype(np.float32)
    for row, score in enumerate(found):
        right = {passages.index(passage) for query, passage in texts if query == texts[row, 0]}
        assert score.score == pytest.approx(ndcg(every @ vectors[row, 0], right))
        assert score.loss >= 0
    assert Embedder("accuracy").together(part, range(40), [Score(0.0, 1, 0.0, vectors=np.ones((2, 6)))] * 40)[0].score == 0.0


def test_the_bootstrap_of_spearman_ranks_each_sample_anew():
    draw = np.random.default_rng(0)
    y = draw.integers(0, 6, 60) / 5
    x = (y + 0.3 * draw.normal(size=60)).round(1)
    times = draw.multinomial(60, np.full(60, 1 / 60), size=40)
    rows = np.stack([np.ones(60), x, y], axis=1)
    wanted = [spearmanr(np.repeat(x, often), np.repeat(y, often)).statistic for often in times]
    assert SPEARMAN.of_samples(rows, times) == pytest.approx(wanted)
    assert SPEARMAN.of_samples(rows * [1, 0, 1], times)[0] == 0.0  # nothing varies
    worse = np.stack([np.ones(60), x + 4 * draw.normal(size=60), y], axis=1)
    found = compare(rows, worse, np.ones(60), higher_is_better=True, corpus=SPEARMAN)
    assert found.delta == pytest.approx(spearmanr(x, y).statistic - spearmanr(worse[:, 1], y).statistic)
    assert found.p_value < 0.01 < found.ci95[0]
    doubled = [np.concatenate([arm, arm]) for arm in (rows, worse)]
    groups = np.tile(np.arange(60), 2)
    again = compare(*doubled, np.ones(120), higher_is_better=True, corpus=SPEARMAN, groups=groups)
    assert again.ci95 == pytest.approx(found.ci95)  # equal rows are one witness


@pytest.mark.parametrize("mode", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_poolings_are_those_of_sentence_transformers(mode):
    pooling = pytest.importorskip("sentence_transformers.sentence_transformer.modules.pooling")
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    for prompt in (0, 1):
        features = {"token_embeddings": hidden.clone(), "attention_mask": mask.clone(), "prompt_length": prompt}
        wanted = pooling.Pooling(4, mode, include_prompt=False)(features)["sentence_embedding"]
        seen = mask.clone()
        seen[:, :prompt] = 0
        assert torch.allclose(embeddings(hidden, seen, SentenceLayout((mode,))), wanted)


def test_prompts_go_by_the_columns():
    layout = SentenceLayout(("mean",), prompts={"query": "q: ", "passage": "p: ", "sts": "s: "}, default_prompt="sts")
    assert prompts_of(layout, ("query", "document", "negative")) == ("q: ", "p: ", "p: ")
    assert prompts_of(layout, ("anchor", "positive")) == ("s: ", "s: ")
    assert prompts_of(SentenceLayout(("mean",)), ("question", "answer")) == ("", "")


# ---------------------------------------------------------------- the layout


def test_new_names_of_modules_and_fields_say_the_same(tmp_path):
    old = embedder_checkpoint(tmp_path / "old", pooling={**OLD_MEAN, "pooling_mode_cls_token": True})
    new = embedder_checkpoint(
        tmp_path / "new", pooling={"embedding_dimension": 32, "pooling_mode": ["cls", "mean"]}, package=NEWER
    )
    assert read_sentence_layout(old) == read_sentence_layout(new)
    assert read_sentence_layout(old).poolings == ("cls", "mean")


def test_a_model_without_modules_needs_a_pooling(command, refused, place, tmp_path):
    encoder = encoder_checkpoint(tmp_path / "m")
    said = refused(encoder, "--data", place / "pairs.jsonl", *QUIET, "-o", tmp_path / "x")
    assert "give --set pooling=mean" in said
    report = run(command, encoder, place / "pairs.jsonl", tmp_path / "out", "--set", "pooling=cls")
    assert report["preprocessing"]["modules"] == "cls pooling"
    said = refused(place / "model", "--data", place / "pairs.jsonl", *QUIET, "-o", tmp_path / "x", "--set", "pooling=cls")
    assert "modules.json says mean pooling, normalize: leave it out" in said


def test_a_file_of_a_model_with_a_head_keeps_its_names(command, place, tmp_path):
    """As many released models are: the names have a prefix, and a head is there that embeddings do not use."""
    folder = embedder_checkpoint(tmp_path / "m", kind="DistilBert", dim=32, n_layers=2, n_heads=2, hidden_dim=48)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 32}
    builders.masked_checkpoint(tmp_path / "lm", kind="DistilBert", **sizes)
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes((tmp_path / "lm" / name).read_bytes())
    report = run(command, folder, place / "pairs.jsonl", tmp_path / "out")
    assert report["task"] == "embedding"
    assert command("verify", folder, tmp_path / "out").code == 0
    one, two = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "out"))
    assert torch.equal(one["vocab_transform.weight"], two["vocab_transform.weight"])
    assert not torch.equal(
        one["distilbert.transformer.layer.0.ffn.lin1.weight"], two["distilbert.transformer.layer.0.ffn.lin1.weight"]
    )


ODD = {
    "sparse": (
        "sentence_transformers.sparse_encoder.models.SpladePooling",
        "sparse embeddings (SPLADE), which are not supported",
    ),
    "other module": ("sentence_transformers.models.LSTM", "the module LSTM (2_Normalize) is not supported"),
    "outside": ("../elsewhere", "outside its own; refused"),
    "similarity": ("", "compares embeddings by 'euclidean'"),
    "pickle": ("", "has no model.safetensors. Save the model once with sentence-transformers"),
    "activation": ("", "the activation os.system is not supported"),
    "pooling": ("", "no pooling 'median'"),
    "T5": ("", "t5 is an encoder-decoder"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_not_supported_is_refused_by_its_name(refused, place, tmp_path, kind):
    module, message = ODD[kind]
    steps = ("Dense",) if kind in ("pickle", "activation") else ("Normalize",)
    settings = {"similarity_fn_name": "euclidean"} if kind == "similarity" else None
    pooling = {"pooling_mode": "median"} if kind == "pooling" else OLD_MEAN
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2} if kind == "T5" else {}
    folder = embedder_checkpoint(tmp_path / "m", pooling, steps, settings, kind="T5" if kind == "T5" else "Bert", **sizes)
    listed = json.loads((folder / "modules.json").read_text())
    if kind == "outside":
        listed[2]["path"] = module
    elif module:
        listed[2]["type"] = module
    save_json(folder / "modules.json", listed)
    if kind == "pickle":
        (folder / "2_Dense/model.safetensors").unlink()
    if kind == "activation":
        save_json(folder / "2_Dense/config.json", {"activation_function": "os.system"})
    assert message in refused(folder, "--data", place / "pairs.jsonl", *QUIET, "-o", tmp_path / "out")


# ---------------------------------------------------------------- the data


def test_unusable_rows_are_skipped_and_named(command, place, tmp_path):
    odd = [
        {"query": "the cat", "passage": None},
        {"query": "the cat", "passage": "the cat"},
    ]
    data = write(tmp_path / "d.jsonl", [*together_rows(), *odd])
    report = run(command, place / "model", data, tmp_path / "out")
    skipped = {item["row"]: item["reason"] for item in report["data"]["train"]["skipped"]}
    assert skipped == {32: "no passage", 33: "query and passage are the same text"}


def test_rows_of_one_query_stay_together(command, place, tmp_path):
    rows = together_rows(40)
    for number, row in enumerate(rows):
        row["query"] = rows[number // 4 * 4]["query"]
    report = run(command, place / "model", write(tmp_path / "d.jsonl", rows), tmp_path / "out")
    table = pq.read_table(tmp_path / "out/dsd/predictions.parquet").to_pydict()
    judged = {int(row) // 4 for row in table["row"]}
    assert len(table["row"]) == 4 * len(judged)
    assert any("rows repeat the content of another: p and interval count equal rows as one" in w for w in report["warnings"])


def test_scores_beyond_one_are_scaled_and_said(command, place, tmp_path):
    rows = rows_of(place / "scored.jsonl")
    data = write(tmp_path / "d.jsonl", [{**row, "score": 5 * row["score"]} for row in rows])
    report = run(command, place / "model", data, tmp_path / "out")
    assert report["preprocessing"]["loss"].endswith("scores from 0 to 5 become 0 to 1")
    table = pq.read_table(tmp_path / "out/dsd/predictions.parquet").to_pydict()
    assert [float(value) for value in table["target"]] == pytest.approx([rows[int(row)]["score"] for row in table["row"]])


@pytest.mark.parametrize("how", ["unlike", "one column", "classes", "label of pairs", "one row a batch"])
def test_data_of_another_kind_are_refused(refused, place, tmp_path, how):
    rows = {
        "unlike": [{"sentence1": row["query"], "sentence2": row["passage"]} for row in together_rows()],
        "one column": [{"text": row["query"], "label": 1} for row in together_rows()],
        "classes": rows_of(place / "scored.jsonl"),
    }.get(how, together_rows(names=("anchor", "positive")))
    data, more = write(tmp_path / "d.jsonl", rows), ()
    if how == "classes":
        kind = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
        table = datasets.Dataset.from_list([{**row, "score": n % 3} for n, row in enumerate(rows)]).cast_column("score", kind)
        data = tmp_path / "d"
        table.save_to_disk(data)
    if how == "label of pairs":
        more = ("--label-column", "positive")
    if how == "one row a batch":
        more = ("--batch-size", 1)
    said = refused(place / "model", "--data", data, *QUIET, "-o", tmp_path / "out", *more)
    wanted = {
        "unlike": "call the columns anchor and positive",
        "one column": "embedding compares texts, and 'text' is one column",
        "classes": "has classes (entailment, neutral, contradiction)",
        "label of pairs": "--label-column positive: the data are read as anchor,positive",
        "one row a batch": "a row's negatives are the other rows of its batch",
    }[how]
    assert wanted in said, said
