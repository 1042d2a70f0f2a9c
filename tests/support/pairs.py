"""Tiny encoder-decoders with tokenizers of their own families, and pairs of texts or of sounds and texts."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import builders
import numpy as np
from builders import LETTERS, WORDS, save_transformers, seeded

WIDE = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0, "max_position_embeddings": 40}  # fmt: skip
# other words for the same things: what a tiny translator learns
OTHERS = [word[::-1] + "o" for word in WORDS]
LANGUAGES = ("eng_Latn", "deu_Latn", "fra_Latn")


def seq2seq_checkpoint(folder: Path, family: str = "t5", seed: int = 0, **config: Any) -> Path:
    """A model of two layers with the tokenizer of its family: t5, bart, marian, nllb (M2M100's class) or mbart."""
    import transformers as library

    tokenizer = _tokenizer(library, family, folder)
    size = {"vocab_size": len(tokenizer)}
    if family == "t5":
        made = library.T5Config(
            **(size | {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
                       "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0} | config)
        )  # fmt: skip
        cls = library.T5ForConditionalGeneration
    else:
        names = {"bart": "Bart", "marian": "Marian", "nllb": "M2M100", "mbart": "MBart"}
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        starts = {"marian": tokenizer.pad_token_id, "mbart": tokenizer.get_vocab().get("de_DE")}
        ids["decoder_start_token_id"] = starts.get(family, tokenizer.eos_token_id)
        ids |= {"bos_token_id": tokenizer.bos_token_id or 0, "forced_eos_token_id": None}
        made = getattr(library, f"{names[family]}Config")(**(size | WIDE | ids | config))
        cls = getattr(library, "MarianMTModel" if family == "marian" else f"{names[family]}ForConditionalGeneration")
    with seeded(seed):
        model = cls(made)
    model.generation_config.max_length = 16
    if family == "nllb":
        model.generation_config.forced_bos_token_id = tokenizer.get_vocab()["deu_Latn"]
    return save_transformers(model, folder, tokenizer)


def _tokenizer(library: Any, family: str, folder: Path) -> Any:
    pieces = (
        [("▁" + word, -2.0) for word in [*WORDS, *OTHERS]]
        + [("▁", -5.0)]
        + [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    )
    if family == "t5":
        vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]
        return library.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=40)
    if family == "mbart":
        vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]
        return library.MBartTokenizer(vocab=vocabulary, src_lang="en_XX", tgt_lang="de_DE", model_max_length=40)
    if family == "nllb":
        vocabulary = {
            piece: number for number, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *(piece for piece, _ in pieces)])
        }
        joined = [piece for piece, _ in pieces if len(piece) == 1]

        return library.NllbTokenizer(
            vocab={name: number for number, name in enumerate(["<s>", "<pad>", "</s>", "<unk>", *joined])}, merges=[],
            extra_special_tokens=list(LANGUAGES), src_lang="eng_Latn", tgt_lang="deu_Latn", model_max_length=40,
        )  # fmt: skip
    if family == "marian":
        return _marian(library, folder)
    tokenizer = builders.word_tokenizer([*WORDS, *OTHERS])
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    return tokenizer


def _marian(library: Any, folder: Path) -> Any:
    """A SentencePiece model for each side, and one vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {"</s>": 0, "<unk>": 1}
    for name, words in (("source", WORDS), ("target", OTHERS)):
        model = sentencepiece_model(words)
        (folder / f"{name}.spm").write_bytes(model)
        for piece in pieces_of(model):
            vocabulary.setdefault(piece, len(vocabulary))
    vocabulary["<pad>"] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return library.MarianTokenizer(
        str(folder / "source.spm"), str(folder / "target.spm"), str(folder / "vocab.json"), source_lang="en", target_lang="xx",
        model_max_length=40,
    )  # fmt: skip


def sentencepiece_model(words: Sequence[str]) -> bytes:
    """A SentencePiece model of these words, trained on the fly."""
    import sentencepiece

    buffer = io.BytesIO()
    draw = np.random.default_rng(0)
    sentences = [" ".join(draw.choice(words, 6)) for _ in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=buffer, vocab_size=70, model_type="unigram", hard_vocab_limit=False,
        minloglevel=2, num_threads=1, bos_id=-1, eos_id=0, unk_id=1,
    )  # fmt: skip
    return buffer.getvalue()


def pieces_of(model: bytes) -> list[str]:
    """The pieces of a SentencePiece model, without its special ones."""
    import sentencepiece

    reader = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [
        reader.IdToPiece(number)
        for number in range(reader.GetPieceSize())
        if reader.IdToPiece(number) not in ("</s>", "<unk>", "<s>")
    ]


def pairs(rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Sentences of two to six known words, and their translations word by word."""
    draw = np.random.default_rng(seed)
    numbers = [draw.integers(0, len(WORDS), draw.integers(2, 7)) for _ in range(rows)]
    return [{"source": " ".join(WORDS[n] for n in row), "target": " ".join(OTHERS[n] for n in row)} for row in numbers]


def pairs_file(path: Path, rows: int = 24, seed: int = 0, names: tuple[str, str] = ("source", "target")) -> Path:
    """A JSON-lines file of such pairs."""
    return write_lines(path, [{names[0]: row["source"], names[1]: row["target"]} for row in pairs(rows, seed)])


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """A JSON-lines file of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def whisper_checkpoint(
    folder: Path, seed: int = 0, multilingual: bool = True, language: str | None = "english", **config: Any
) -> Path:
    """A Whisper of two layers that hears one second, with its own tokenizer and feature extractor."""
    import transformers as library
    from tokenizers import pre_tokenizers
    from transformers.models.whisper.tokenization_whisper import LANGUAGES as SPOKEN

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    special = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in SPOKEN),
               "<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]  # fmt: skip
    tokenizer = library.WhisperTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>", model_max_length=40)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    ids = tokenizer.get_vocab()
    extractor = library.WhisperFeatureExtractor(feature_size=16, sampling_rate=8000, hop_length=160, chunk_length=1, n_fft=400)
    start, end = ids["<|startoftranscript|>"], ids["<|endoftext|>"]
    made = library.WhisperConfig(
        **({"vocab_size": len(tokenizer), "num_mel_bins": 16, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "max_source_positions": extractor.nb_max_frames // 2, "max_target_positions": 40, "dropout": 0.0,
            "pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start} | config)
    )  # fmt: skip
    with seeded(seed):
        model = library.WhisperForConditionalGeneration(made)
    settings = model.generation_config
    settings._from_model_config = False  # else transformers drops what only Whisper has when it reads the file
    settings.max_length, settings.is_multilingual, settings.return_timestamps = 20, multilingual, False
    settings.suppress_tokens, settings.begin_suppress_tokens = [ids["<|startoflm|>"]], [end]
    settings.no_timestamps_token_id, settings.decoder_start_token_id = ids["<|notimestamps|>"], start
    if multilingual:
        settings.lang_to_id = {f"<|{code}|>": ids[f"<|{code}|>"] for code in SPOKEN}
        settings.task_to_id = {name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")}
        if language is not None:
            settings.language, settings.task = language, "transcribe"
    return save_transformers(model, folder, extractor, tokenizer)


def speech2text_checkpoint(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A Speech2Text of two layers, with a SentencePiece tokenizer for words of the letters a to f."""
    import transformers as library

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    model_file = sentencepiece_model(["".join(draw.choice(list(LETTERS), draw.integers(1, 4))) for _ in range(60)])
    (folder / "sentencepiece.bpe.model").write_bytes(model_file)
    names = ["<s>", "<pad>", "</s>", "<unk>", *pieces_of(model_file)]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}), encoding="utf-8")
    tokenizer = library.Speech2TextTokenizer(str(folder / "vocab.json"), str(folder / "sentencepiece.bpe.model"))
    extractor = library.Speech2TextFeatureExtractor(feature_size=16, sampling_rate=8000, num_mel_bins=16)
    made = library.Speech2TextConfig(
        **({"vocab_size": len(names), "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0,
            "input_feat_per_channel": 16, "conv_channels": 16, "num_conv_layers": 2, "max_source_positions": 400,
            "max_target_positions": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
            "decoder_start_token_id": 2} | config)
    )  # fmt: skip
    with seeded(seed):
        model = library.Speech2TextForConditionalGeneration(made)
    model.generation_config.max_length = 20
    return save_transformers(model, folder, extractor, tokenizer)
