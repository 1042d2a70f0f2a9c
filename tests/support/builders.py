"""Small checkpoints and data sets, made on the fly: deterministic, offline, a second or less each.

Every function writes into a given path and returns it (or the folder), so that a test reads as what it makes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dsd_refine.checkpoint.safetensors_file import build_header, memory

WORDS = "the a cat dog bird fish sees hears likes eats small large red blue old new good bad not and or here now then".split()  # noqa: SIM905
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def timm_checkpoint(
    folder: Path,
    classes: Sequence[str] | int = ("a", "b", "c"),
    arch: str = "test_resnet",
    in_chans: int = 1,
    size: int = 32,
    seed: int = 0,
    **args: Any,
) -> Path:
    """A timm folder (config.json, model.safetensors) of random weights.

    `classes` as names gives the config `label_names`; as a number it gives none. `args` go to `timm.create_model`.
    """
    import timm
    from timm.models import save_for_hf

    names = None if isinstance(classes, int) else list(classes)
    args |= {"in_chans": in_chans}
    cfg: dict[str, Any] = {
        "input_size": (in_chans, size, size),
        "test_input_size": (in_chans, size, size),
        "mean": (0.5,) * in_chans,
        "std": (0.5,) * in_chans,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "tag": None,
        "hf_hub_id": None,
    }
    with seeded(seed):
        model = timm.create_model(arch, num_classes=len(names) if names else classes, pretrained_cfg_overlay=cfg, **args)
    save_for_hf(
        model,
        str(folder),
        model_config={"label_names": names} if names else None,
        model_args=args,
        safe_serialization=True,
    )
    return folder


def bert_checkpoint(folder: Path, labels: Sequence[str] | int = ("neg", "pos"), seed: int = 0, **config: Any) -> Path:
    """A BERT text classifier of two layers with its word-level tokenizer. `labels` as a number: LABEL_0, LABEL_1, …"""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        **_label_config(labels),
    }
    with seeded(seed):
        model = BertForSequenceClassification(BertConfig(**(sizes | config)))
    return save_transformers(model, folder, word_tokenizer())


def masked_checkpoint(folder: Path, seed: int = 0, kind: str = "Bert", **config: Any) -> Path:
    """A BERT (or RoBERTa) masked language model of two layers with its word-level tokenizer."""
    import transformers

    sizes = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    with seeded(seed):
        model = getattr(transformers, f"{kind}ForMaskedLM")(getattr(transformers, f"{kind}Config")(**(sizes | config)))
    return save_transformers(model, folder, word_tokenizer())


def gpt2_checkpoint(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A GPT-2 language model of two layers (tied head) with its word-level tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "n_positions": 32,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    with seeded(seed):
        model = GPT2LMHeadModel(GPT2Config(**(sizes | config)))
    return save_transformers(model, folder, word_tokenizer())


def vit_checkpoint(
    folder: Path, labels: Sequence[str] | int = ("a", "b", "c"), size: int = 32, channels: int = 3, seed: int = 0, **config: Any
) -> Path:
    """A ViT image classifier of two layers with its image processor's config."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": size,
        "patch_size": 8,
        "num_channels": channels,
        **_label_config(labels),
    }
    with seeded(seed):
        model = ViTForImageClassification(ViTConfig(**(sizes | config)))
    halves = [0.5] * channels
    processor = ViTImageProcessor(size={"height": size, "width": size}, image_mean=halves, image_std=halves)
    return save_transformers(model, folder, processor)


def torchvision_checkpoint(
    folder: Path,
    architecture: str = "shufflenet_v2_x0_5",
    classes: Sequence[str] = ("a", "b", "c"),
    size: int = 32,
    **args: Any,
) -> Path:
    """A torchvision folder in our layout (config.json, model.safetensors) of random weights."""
    from torchvision.models import get_model

    with seeded(0):
        model = get_model(architecture, num_classes=len(classes), **args)
    config = {
        "library": "torchvision",
        "architecture": architecture,
        "label_names": list(classes),
        "args": args,
        "preprocessing": {
            "resize_size": size, "crop_size": size, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear",
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tensors(folder / "model.safetensors", model.state_dict())
    return folder


def torchvision_cache(home: Path, architecture: str) -> Path:
    """TORCH_HOME with a `.pth` of random weights under the name of torchvision's released file. Returns the file."""
    from torchvision.models import get_model, get_model_weights

    with seeded(0):
        model = get_model(architecture)
    file = home / "hub/checkpoints" / get_model_weights(architecture).DEFAULT.url.rsplit("/", 1)[-1]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return file


def save_transformers(model: Any, folder: Path, *parts: Any) -> Path:
    """`save_pretrained` of a model and of what goes with it (tokenizer, processor)."""
    for part in (model, *parts):
        part.save_pretrained(folder)
    return folder


def word_tokenizer(words: Sequence[str] = WORDS) -> Any:
    """A fast tokenizer whose tokens are whole words, with BERT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
    )


def image_folder(
    folder: Path,
    classes: Sequence[str] = ("a", "b", "c"),
    per_class: int = 8,
    size: int = 32,
    channels: int = 1,
    splits: Sequence[str] = ("train", "test"),
    seed: int = 0,
) -> Path:
    """Class folders of distinct noisy PNGs, `folder/SPLIT/CLASS/N.png` (no splits: `folder/CLASS/N.png`).

    Each class is brighter in a stripe of its own, so that a model can learn them.
    """
    draw = np.random.default_rng(seed)
    for split in splits or [""]:
        for number, name in enumerate(classes):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for row in range(per_class):
                pixels = draw.integers(0, 96, (size, size, channels), dtype=np.uint8)
                pixels[number * size // len(classes) : (number + 1) * size // len(classes)] += 128
                Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(place / f"{row:03}.png")
    return folder


def text_csv(path: Path, rows: int = 24, labels: Sequence[str] = ("neg", "pos"), seed: int = 0) -> Path:
    """A CSV of `text,label`: sentences of 3 to 8 known words, ended by one that tells the label; labels in turn."""
    draw = np.random.default_rng(seed)
    lines = ["text,label"]
    for row in range(rows):
        words = [*draw.choice(WORDS, draw.integers(3, 9)), WORDS[row % len(labels)]]
        lines.append(f"{' '.join(words)},{labels[row % len(labels)]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def text_file(path: Path, paragraphs: int = 12, seed: int = 0) -> Path:
    """A text file of paragraphs of 6 to 40 known words, an empty line between them."""
    draw = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [" ".join(draw.choice(WORDS, draw.integers(6, 41))) for _ in range(paragraphs)]
    path.write_text("\n\n".join(found) + "\n", encoding="utf-8")
    return path


LETTERS = "abcdef"


def ctc_checkpoint(folder: Path, family: str = "Wav2Vec2", rate: int = 8000, seed: int = 0, **config: Any) -> Path:
    """A CTC model of two layers for the letters a to f, with feature extractor and tokenizer: 50 frames a second at 8 kHz.

    `feat_extract_norm="group"` (the default) takes no attention mask, `"layer"` does.
    """
    import transformers

    sizes = {
        "vocab_size": 5 + len(LETTERS),
        "pad_token_id": 0,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_dim": (16, 16, 16),
        "conv_kernel": (10, 8, 4),
        "conv_stride": (8, 5, 4),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "mask_time_length": 4,
        "mask_time_prob": 0.05,
        "layerdrop": 0.0,
        **dict.fromkeys(
            ("hidden_dropout", "attention_dropout", "activation_dropout", "final_dropout", "feat_proj_dropout"), 0.0
        ),
    }
    with seeded(seed):
        made = getattr(transformers, f"{family}Config")(**(sizes | config))
        model = getattr(transformers, f"{family}ForCTC")(made)
    masked = getattr(made, "feat_extract_norm", "layer") == "layer"
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=rate, return_attention_mask=masked)
    return save_transformers(model, folder, extractor, letter_tokenizer(folder))


def letter_tokenizer(folder: Path) -> Any:
    """wav2vec2's tokenizer for LETTERS; `|` is the space, and `<pad>` CTC's blank."""
    from transformers import Wav2Vec2CTCTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    names = ["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}), encoding="utf-8")
    return Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))


def spoken(text: str, rate: int = 8000, letter: float = 0.1, seed: int = 0) -> np.ndarray[Any, Any]:
    """A text as sound, float32: each letter a tone of its own of so many seconds, a space a pause, with a little noise."""
    count = round(rate * letter)
    time = np.arange(count) / rate
    ramp = np.minimum(1, np.minimum(np.arange(count), np.arange(count)[::-1]) / max(1, count // 8))
    tones = [ramp * np.sin(2 * np.pi * (300 + 250 * LETTERS.find(one)) * time) if one != " " else 0 * time for one in text]
    noise = np.random.default_rng(seed).normal(0, 0.01, count * len(text))
    return (0.5 * np.concatenate(tones) + noise).astype(np.float32)


def speech_folder(
    folder: Path, rows: int = 16, splits: Sequence[str] = ("train", "test"), rate: int = 8000, seed: int = 0
) -> Path:
    """`folder/SPLIT/metadata.csv` (file_name, text) and WAV files of one to three words of the letters."""
    import soundfile

    for number, split in enumerate(splits or [""]):
        draw, place, lines = np.random.default_rng([seed, number]), folder / split, ["file_name,text"]
        place.mkdir(parents=True, exist_ok=True)
        for row in range(rows):
            words = ["".join(draw.choice(list(LETTERS), draw.integers(1, 4))) for _ in range(draw.integers(1, 4))]
            soundfile.write(place / f"{row:03}.wav", spoken(" ".join(words), rate, seed=row), rate)
            lines.append(f"{row:03}.wav,{' '.join(words)}")
        (place / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def caption_checkpoint(folder: Path, kind: str = "vit-gpt2", seed: int = 0, size: int = 32) -> Path:
    """A tiny captioner with its image processor and word tokenizer: `vit-gpt2`, `vit-bert` (VisionEncoderDecoder), `blip`, `git`.

    GPT-2's tokenizer sets neither start nor end; BERT's sets both, as BLIP's and GIT's do.
    """
    import transformers

    with seeded(seed):
        model = _captioner(transformers, kind, size)
    halves = [0.5] * 3
    processors = {"blip": "BlipImageProcessor", "git": "CLIPImageProcessor"}
    processor = getattr(transformers, processors.get(kind, "ViTImageProcessor"))(
        size={"height": size, "width": size},
        image_mean=halves,
        image_std=halves,
        **({"do_center_crop": False} if kind == "git" else {}),
    )
    tokenizer = word_tokenizer()
    if kind == "vit-gpt2":
        from tokenizers import processors as steps

        tokenizer.backend_tokenizer.post_processor = steps.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    return save_transformers(model, folder, processor, tokenizer)


def _captioner(transformers: Any, kind: str, size: int) -> Any:
    words, common = len(SPECIAL) + len(WORDS), {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    seen = {**common, "intermediate_size": 48, "image_size": size, "patch_size": 8}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    read = {**common, **ids, "intermediate_size": 48, "vocab_size": words, "max_position_embeddings": 24}
    if kind == "git":
        return transformers.GitForCausalLM(transformers.GitConfig(vision_config=seen, **read))
    if kind == "blip":
        text = {
            **read,
            "sep_token_id": 3,
            "encoder_hidden_size": 32,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        return transformers.BlipForConditionalGeneration(transformers.BlipConfig(vision_config=seen, text_config=text))
    cross = {"is_decoder": True, "add_cross_attention": True}
    if kind == "vit-bert":
        decoder = transformers.BertConfig(**read, **cross)
    else:
        sizes = {"n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 2}
        decoder = transformers.GPT2Config(vocab_size=words, **sizes, **ids, **cross)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(transformers.ViTConfig(**seen), decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    return transformers.VisionEncoderDecoderModel(config)


COLOURS = {"red": (220, 40, 40), "blue": (40, 40, 220)}


def caption_folder(
    folder: Path, rows: int = 12, splits: Sequence[str] = ("train", "test"), size: int = 32, captions: int = 1, seed: int = 0
) -> Path:
    """`folder/SPLIT/metadata.jsonl` (file_name, text) and pictures of a square: its colour and size are what the text says.

    With several `captions` the text is a list.
    """
    for number, split in enumerate(splits or [""]):
        draw, place, lines = np.random.default_rng([seed, number]), folder / split, []
        place.mkdir(parents=True, exist_ok=True)
        for row in range(rows):
            colour, large = draw.choice(list(COLOURS)), draw.integers(2)
            picture, side = draw.integers(0, 60, (size, size, 3), dtype=np.uint8), size // (2 - large) - 4
            x, y = draw.integers(0, size - side, 2)
            picture[y : y + side, x : x + side] = COLOURS[colour]
            Image.fromarray(picture).save(place / f"{row:03}.png")
            kind = ("small", "large")[large]
            said = [f"the cat likes a {kind} {colour} fish", f"a {kind} {colour} fish", f"now the {colour} fish eats"][
                :captions
            ]
            lines.append(json.dumps({"file_name": f"{row:03}.png", "text": said if captions > 1 else said[0]}))
        (place / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file with exactly this order of tensors, aliases and duplicates included."""
    head, _ = build_header(dict(tensors), dict(metadata or {"format": "pt"}))
    path.write_bytes(head + b"".join(memory(tensor) for tensor in tensors.values()))
    return path


def write_shards(
    folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]], metadata: Mapping[str, str] | None = None
) -> Path:
    """Shards and their index, in place of any model.safetensors of the folder. `shards`: file name -> its tensors."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name, tensors in shards.items():
        write_tensors(folder / name, tensors, metadata)
    size = sum(t.numel() * t.element_size() for tensors in shards.values() for t in tensors.values())
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def copy_folder(source: Path, target: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(source, target)
    return target


class seeded:
    """Within, torch draws from `seed`; outside, its generator is as it was."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.state)


def _label_config(labels: Sequence[str] | int) -> dict[str, Any]:
    if isinstance(labels, int):
        return {"num_labels": labels}
    return {"id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)}}
