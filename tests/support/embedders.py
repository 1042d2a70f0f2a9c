"""A tiny embedding model in sentence-transformers' layout, and rows of texts that belong together."""

import json

import builders
import numpy as np
import torch
from builders import SPECIAL, WORDS, save_transformers, seeded
from heads import write
from safetensors.torch import save_file

OLD_MEAN = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}  # fmt: skip
SIZES = {"vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": 0}  # fmt: skip
NEWER = "sentence_transformers.sentence_transformer.modules.pooling"  # the package of Pooling since version 6


def encoder_checkpoint(folder, kind="Bert", seed=0, **config):
    """A BERT (or another encoder) of two layers without a head."""
    import transformers

    with seeded(seed):
        made = getattr(transformers, f"{kind}Config")(**(SIZES | config))
        model = getattr(transformers, f"{kind}Model")(made)
    return save_transformers(model, folder, builders.word_tokenizer())


def embedder_checkpoint(folder, pooling=OLD_MEAN, steps=("Normalize",), settings=None, texts=None, package="", **config):
    """The same in sentence-transformers' layout.

    `pooling` is the config of the pooling and `package` its package, `steps` are the modules after it, `settings`
    is config_sentence_transformers.json, `texts` is sentence_bert_config.json.
    """
    encoder_checkpoint(folder, **config)
    old = "sentence_transformers.models"
    modules = [("", f"{old}.Transformer"), ("1_Pooling", f"{package or old}.Pooling")]
    modules += [(f"{number}_{step}", f"{old}.{step}") for number, step in enumerate(steps, 2)]
    save_json(folder / "modules.json", [{"idx": n, "name": str(n), "path": p, "type": t} for n, (p, t) in enumerate(modules)])
    save_json(folder / "1_Pooling/config.json", pooling)
    save_json(folder / "sentence_bert_config.json", texts or {"max_seq_length": 16, "do_lower_case": False})
    save_json(
        folder / "config_sentence_transformers.json", {"__version__": {"sentence_transformers": "2.0.0"}, **(settings or {})}
    )
    for path, _ in modules:
        if path.endswith("Dense"):
            dense_module(folder / path)
    return folder


def dense_module(folder, width=24):
    """A Dense module with its own weights file."""
    name = "torch.nn.modules.activation.Tanh"
    save_json(folder / "config.json", {"in_features": 32, "out_features": width, "bias": True, "activation_function": name})
    draw = torch.Generator().manual_seed(5)
    weights = {"linear.weight": torch.randn(width, 32, generator=draw), "linear.bias": torch.randn(width, generator=draw)}
    save_file(weights, folder / "model.safetensors")


def save_json(path, value):
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def together_rows(rows=32, seed=0, names=("query", "passage"), negative=False):
    """A query of three words, a passage that holds two of them, and (`negative`) one that holds none."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(rows):
        said = draw.permutation(WORDS)
        row = {names[0]: " ".join(said[:3]), names[1]: " ".join([*said[3:5], *said[:2]])}
        found.append({**row, "negative": " ".join(said[6:10])} if negative else row)
    return found


def together_file(path, **how):
    """A JSON-lines file of such rows."""
    return write(path, together_rows(**how))
