"""Rows of a batch are answered as the plain library answers each by itself, whatever fills the shorter ones."""

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from builders import WORDS, save_transformers, seeded, word_tokenizer
from conftest import SHORT

SIZES = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "Llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48},
    "Bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
}


def classifier(folder, kind, side="right", appends=True, tokenizer_pad=None, **config):
    tokenizer = word_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side = tokenizer_pad, "[SEP]", side
    if not appends:
        from tokenizers import processors

        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    sizes = {
        "vocab_size": len(tokenizer),
        "eos_token_id": 3,
        "num_labels": 2,
        "initializer_range": 0.5,
        **SIZES[kind],
        **config,
    }
    with seeded(0):
        made = getattr(transformers, f"{kind}Config")(**sizes)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(made)
    return save_transformers(model, folder, tokenizer)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GPT2", {}),
        ("GPT2", {"appends": False}),
        ("GPT2", {"side": "left"}),
        ("GPT2", {"pad_token_id": 3}),  # the library then reads the token before a final [SEP], and so must we
        ("GPT2", {"pad_token_id": 0, "tokenizer_pad": "[SEP]"}),
        ("Llama", {"appends": False}),
        ("XLNet", {"side": "left", "pad_token_id": 0, "tokenizer_pad": "[PAD]"}),
        ("Bert", {"pad_token_id": 0, "tokenizer_pad": "[PAD]"}),
    ],
)
def test_a_row_is_scored_as_the_plain_library_scores_it_alone(command, tmp_path, kind, options):
    source = classifier(tmp_path / "model", kind, **options)
    data, out = tmp_path / "rows.csv", tmp_path / "out"
    rows = [" ".join(WORDS[(row * 7 + i * 3) % len(WORDS)] for i in range(2 + row % 7)) for row in range(40)]
    rows = [f"{text} [SEP]" if row % 3 == 0 else text for row, text in enumerate(rows)]  # an end of text of the row's own
    data.write_text("text,label\n" + "\n".join(f"{text},{row % 2}" for row, text in enumerate(rows)) + "\n")
    found = command(source, "--data", data, "-o", out, *SHORT, "--eval-data", data, "--batch-size", 8, "--quiet")
    assert found.code == 0, found.err
    assert "is padded to" not in found.err
    for folder, arm in ((source, "baseline"), (out, "refined")):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        table = pq.read_table(out / "dsd/predictions.parquet").to_pydict()
        for name, prediction in zip(table["row"], table[f"prediction_{arm}"], strict=True):
            with torch.no_grad():
                alone = model(**tokenizer(rows[int(name)], return_tensors="pt")).logits
            assert int(alone.argmax()) == int(prediction.removeprefix("LABEL_")), name
