"""Tiny models of many families, and what a mask does with each of their tensors: docs/layers.md.

`python tests/support/families.py` writes that file anew from what `dsd_refine` says; tests/test_families.py holds the two together.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dsd_refine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from dsd_refine.checkpoint.libraries.open import open_library
from dsd_refine.checkpoint.source import find_source
from dsd_refine.masking.checkpoint_layers import first_layers, open_layers, outside_embeddings
from dsd_refine.masking.layers import Layer, find_layers
from dsd_refine.recipe import Recipe, read_recipe, shipped, validate
from dsd_refine.task_specs import TASKS

TABLE = Path(__file__).parent.parent.parent / "docs/layers.md"
EMPTY = torch.empty(0, dtype=torch.int64)

TIMM = ("sequencer2d_s", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "levit_128s", "xcit_nano_12_p8_224",
        "coat_tiny", "resmlp_12_224", "nf_resnet26", "tf_efficientnet_cc_b0_4e", "vit_base_patch16_siglip_224")  # fmt: skip
TORCHVISION = ("alexnet", "vgg11_bn", "googlenet", "inception_v3", "resnet18", "resnext50_32x4d", "densenet121", "mobilenet_v2",
               "mnasnet0_5", "shufflenet_v2_x0_5", "squeezenet1_1", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny",
               "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t")  # fmt: skip

LM = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
      "intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
WIDE = {**LM, "head_dim": 16}
MOE = {**LM, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
BERT = {name: LM[name] for name in LM if name not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
SSM = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
       "patch_size": 8}  # fmt: skip
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
FOUR = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
SOUND = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
         "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "pad_token_id": 0}  # fmt: skip
BOTH = {"vision_config": VIT, "text_config": BERT}
PAIRED = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
          "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}

# task -> model type -> config: small, with every kind of tensor that the family has
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "image-classification": {
        "vit": VIT,
        "deit": {**VIT, "architectures": ["DeiTForImageClassification"]},
        "beit": {**VIT, "use_relative_position_bias": True, "use_absolute_position_embeddings": True},
        "dinov2": {**VIT, "mlp_ratio": 2},
        "dinov2_with_registers": {**VIT, "mlp_ratio": 2},
        "siglip": BOTH,
        "clip": BOTH,
        "swin": SWIN,
        "swinv2": SWIN,
        "convnext": STAGES,
        "convnextv2": STAGES,
        "resnet": {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1], "layer_type": "basic"},
        "regnet": {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1], "groups_width": 8},
        "bit": {"embedding_size": 32, "hidden_sizes": [32, 32], "depths": [1, 1], "num_groups": 4},
        "mobilenet_v1": {"image_size": 32, "depth_multiplier": 0.25, "min_depth": 4},
        "mobilenet_v2": {"image_size": 32, "depth_multiplier": 0.25},
        "efficientnet": {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 32},
        "levit": {"image_size": 32, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 1, 1], "key_dim": [8, 8, 8],
                  "depths": [1, 1, 1], "architectures": ["LevitForImageClassification"]},
        "poolformer": FOUR,
        "segformer": {**FOUR, "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16},
    },
    "text-classification": {
        "bert": BERT,
        "roberta": BERT,
        "distilbert": {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2,
                       "max_position_embeddings": 32},
        "albert": {**BERT, "embedding_size": 16},
        "electra": {**BERT, "embedding_size": 16},
        "deberta-v2": {**BERT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p", "p2c"]},
        "modernbert": BERT,
        "mpnet": BERT,
        "xlnet": {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48},
        "funnel": {"vocab_size": 64, "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 48, "block_sizes": [1, 1],
                   "num_decoder_layers": 1},
        "convbert": {**BERT, "embedding_size": 32, "num_attention_heads": 4},
        "squeezebert": {**BERT, "embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2, "intermediate_groups": 2,
                        "output_groups": 2},
        "ibert": BERT,
        "t5": T5,
    },
    "token-classification": {
        "bert": BERT,
        "roberta": BERT,
        "distilbert": {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 32},
        "electra": {**BERT, "embedding_size": 16},
        "xlm-roberta": BERT,
    },
    "embedding": {
        "bert": BERT,
        "roberta": BERT,
        "mpnet": BERT,
        "distilbert": {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 32},
        "xlm-roberta": BERT,
        "modernbert": BERT,
        "qwen3": WIDE,
    },
    "question-answering": {
        "bert": BERT,
        "roberta": BERT,
        "distilbert": {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 32},
        "deberta-v2": {**BERT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p", "p2c"]},
        "xlnet": {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48},
        "bart": {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                 "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32},
    },
    "masked-lm": {"xlm-roberta": BERT, "camembert": BERT},
    "causal-lm": {
        "gpt2": GPT,
        "gptj": {**GPT, "rotary_dim": 4},
        "gpt_neox": BERT,
        "opt": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48,
                "max_position_embeddings": 32, "word_embed_proj_dim": 16, "pad_token_id": 0},
        "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2},
        "falcon": LM,
        "mpt": {"vocab_size": 64, "d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 32},
        "llama": LM,
        "mistral": LM,
        "qwen2": LM,
        "qwen3": WIDE,
        "gemma": WIDE,
        "gemma3_text": WIDE,
        "phi": LM,
        "phi3": LM,
        "mixtral": MOE,
        "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 24},
        "qwen3_moe": {**MOE, "head_dim": 16},
        "qwen3_next": {**MOE, "head_dim": 16, "shared_expert_intermediate_size": 24,
                       "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                       "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        "olmoe": MOE,
        "granitemoe": MOE,
        "granitemoehybrid": {**MOE, **MAMBA2, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"]},
        "deepseek_v3": {**LM, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 2,
                        "first_k_dense_replace": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
                        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_shared_experts": 1},
        "gpt_oss": {**MOE, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "llama4_text": {**MOE, "head_dim": 16, "intermediate_size_mlp": 48, "moe_layers": [0, 1]},
        "dbrx": {"vocab_size": 64, "d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 32,
                 "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
                 "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}},
        "jetmoe": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 16,
                   "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 32},
        "lfm2_moe": {**MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "ernie4_5_moe": {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 1},
        "mamba": SSM,
        "mamba2": {**SSM, "num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2},
        "falcon_mamba": SSM,
        "bamba": {**LM, **MAMBA2, "attn_layer_indices": [1]},
        "jamba": {**LM, "num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2,
                  "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        "rwkv": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
                 "intermediate_size": 48, "context_length": 32},
        "recurrent_gemma": {**LM, "lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 16},
        "xlstm": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2},
    },
    "ctc-speech": {
        "wav2vec2": SOUND,
        "hubert": SOUND,
        "wavlm": SOUND,
        "sew": {**SOUND, "squeeze_factor": 1},
        "data2vec-audio": {**SOUND, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2},
        "wav2vec2-conformer": {**SOUND, "position_embeddings_type": "relative", "conv_depthwise_kernel_size": 3},
        "wav2vec2-bert": {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "intermediate_size": 48, "feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 3},
        "parakeet_ctc": {"vocab_size": 32, "pad_token_id": 0,
                         "encoder_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                                            "intermediate_size": 48, "num_mel_bins": 16, "subsampling_conv_channels": 8,
                                            "conv_kernel_size": 3}},
    },
    "audio-classification": {
        "wav2vec2": {**SOUND, "classifier_proj_size": 16},
        "hubert": {**SOUND, "classifier_proj_size": 16},
        "audio-spectrogram-transformer": {**{name: VIT[name] for name in VIT if name != "image_size"}, "max_length": 32, "num_mel_bins": 16, "frequency_stride": 8,
                                          "time_stride": 8},
        "whisper": {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
                    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 16,
                    "max_source_positions": 32, "max_target_positions": 32, "classifier_proj_size": 16, "pad_token_id": 0},
    },
    "image-captioning": {
        "vision-encoder-decoder": {"encoder": {**VIT, "model_type": "vit"},
                                   "decoder": {**GPT, "model_type": "gpt2", "add_cross_attention": True, "is_decoder": True}},
        "blip": {"vision_config": VIT, "projection_dim": 16,
                 "text_config": {**BERT, "encoder_hidden_size": 32, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}},
        "git": {**BERT, "vision_config": VIT, "bos_token_id": 1, "eos_token_id": 2},
    },
    "image-text-to-text": {family: {"text_config": {**LM, "model_type": "llama"}, "vision_config": VIT, "scale_factor": 2}
                           for family in ("idefics3", "smolvlm")},
    "seq2seq-lm": {
        "t5": T5,
        "mt5": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "umt5": T5,
        "longt5": T5,
        **{family: {**PAIRED, "max_position_embeddings": 32}
           for family in ("bart", "mbart", "marian", "m2m_100", "pegasus", "blenderbot", "blenderbot-small")},
    },
    "speech-seq2seq": {
        "whisper": {**PAIRED, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32},
        "speech_to_text": {**PAIRED, "input_feat_per_channel": 16, "conv_channels": 16, "max_source_positions": 40,
                           "max_target_positions": 32},
    },
}  # fmt: skip


def recipe_of(task: str) -> Recipe:
    """A sparse phase, which freezes what the task's default recipe does."""
    frozen = read_recipe(shipped()[task])["phases"][0].get("frozen", [])
    return validate({"phases": [{"kind": "sparse", "steps": 1, "lr": 0.1, "sparsity": 0.3, "frozen": frozen}]})


def opened(task: str, family: str, folder: Path) -> Checkpoint:
    """A tiny random model of a transformers family, saved and opened again through its files."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **FAMILIES[task][family])
    torch.manual_seed(0)
    getattr(transformers, TASKS[task].auto_class).from_config(config).save_pretrained(folder)
    source = find_source(str(folder))
    return open_checkpoint(source, open_library(source, task))


def of_shapes(model: torch.nn.Module) -> list[Layer]:
    """The layers of an image model on the meta device, whose file has its own names."""
    return find_layers(model, first=first_layers(model, "image-classification"))


def timm_layers() -> Iterator[tuple[str, list[Layer]]]:
    """Every architecture of timm's `test_*` set, and some that have kinds which those lack."""
    import timm

    for name in [*timm.list_models("test_*"), *TIMM]:
        with torch.device("meta"):
            model = timm.create_model(name)
        yield name, of_shapes(model)


def torchvision_layers() -> Iterator[tuple[str, list[Layer]]]:
    from dsd_refine.checkpoint.libraries.torchvision import TorchvisionLibrary
    from dsd_refine.checkpoint.torchvision_release import describe, entry

    with tempfile.TemporaryDirectory() as place:
        for name in TORCHVISION:
            Path(place, "config.json").write_text(json.dumps(describe(*entry(name))))
            yield name, of_shapes(TorchvisionLibrary.open(Path(place)).build_meta())


def transformers_layers(task: str) -> Iterator[tuple[str, list[Layer]]]:
    for family, _, layers in opened_families(task):
        yield family, layers


def opened_families(task: str) -> Iterator[tuple[str, Checkpoint, list[Layer]]]:
    """Each family of a task, opened, with its layers; its files are gone with the next."""
    for family in FAMILIES[task]:
        with tempfile.TemporaryDirectory() as place:
            checkpoint = opened(task, family, Path(place))
            yield family, checkpoint, open_layers(checkpoint, recipe_of(task), [])


# ---------------------------------------------------------------- the table

HEAD = """# What is masked, and why not

Made by `python tests/support/families.py` with timm {timm}, torchvision {torchvision}, transformers {transformers};
`tests/test_families.py` holds it against the code, whose rules are in `dsd_refine/masking/kinds.py`.
`dsd-refine plan MODEL --layers` says the same of any checkpoint, tensor by tensor.

A tensor is named in short: `*` for a number and for all before the last one, `{{a, b}}` for several, no `.weight` at the end.
*×4 experts* marks a tensor that fuses so many, each masked by itself; experts in tensors of their own are layers of their own.
**Share**: the maskable weights among those outside embeddings (a report's `maskable_share`, which warns below a third). The
models of transformers are tiny here, so that tables and first layers are a larger part of them than of real ones.
**1-D** counts biases, norms and other vectors: masked nowhere, not named. Nor does a mask touch what the task's loss does not
reach, which is found on the data.
"""
FIRST = "the first layer: it sees the input"
UNSHOWN = ("1-D parameter", "norm")


def table() -> str:
    """The whole of docs/layers.md."""
    sections = [section("timm", timm_layers()), section("torchvision", torchvision_layers())]
    sections += [section(task, transformers_layers(task)) for task in FAMILIES]
    return "\n".join([head(), *sections])


def head() -> str:
    import timm
    import torchvision
    import transformers

    libraries = (timm, torchvision, transformers)
    return HEAD.format(**{library.__name__: library.__version__.split("+")[0] for library in libraries})


def section(title: str, found: Iterable[tuple[str, list[Layer]]]) -> str:
    """The rows of one library, or of one task of transformers."""
    title = f"transformers: {title}" if title in FAMILIES else title
    lines = [f"## {title}", "", "| model | share | 1-D | masked | not masked, and why |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(row(name, layers) for name, layers in found), ""])


def row(name: str, layers: Sequence[Layer]) -> str:
    share = sum(layer.weights for layer in layers if layer.excluded is None) / outside_embeddings(layers)
    plain = sum(layer.excluded in UNSHOWN for layer in layers)
    masked = patterns([layer for layer in layers if layer.excluded is None])
    reasons = dict.fromkeys(said(layer) for layer in layers if layer.excluded not in (None, *UNSHOWN))
    others = [f"*{reason}*: {patterns([x for x in layers if x.excluded and said(x) == reason])}" for reason in reasons]
    return f"| {name} | {share:.1%} | {plain} | {masked} | {'; '.join(others)} |"


def said(layer: Layer) -> str:
    """The reason, without the other name of what has two."""
    reason = layer.excluded or ""
    return "the same storage as another" if reason.startswith("the same storage") else reason


def patterns(layers: Sequence[Layer]) -> str:
    """Names in short: numbers as `*`, the way to the last number left out, what differs at the end in braces."""
    found: dict[str, dict[str, None]] = {}
    for layer in layers:
        if layer.excluded == FIRST:
            found[layer.name.removesuffix(".weight")] = {"": None}
            continue
        parent, _, last = layer.name.removesuffix(".weight").rpartition(".")
        parent = re.sub(r"\d\w*", "*", parent)
        parent = re.sub(r"^.*\.\*(?=\.|$)", "*", parent)
        last = ("*" if last.isdigit() else last) + (f" ×{layer.groups} experts" if layer.groups > 1 else "")
        found.setdefault(parent, {})[last] = None
    return ", ".join(f"`{'.'.join(filter(None, (parent, braced(list(ends)))))}`" for parent, ends in found.items())


def braced(ends: list[str]) -> str:
    return ends[0] if len(ends) == 1 else "{" + ", ".join(ends) + "}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    TABLE.write_text(table(), encoding="utf-8")
