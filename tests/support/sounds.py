"""Tiny models that name sounds, and class folders of tones."""

import numpy as np
from builders import save_transformers, seeded

RATE = 8000
TONES = {"low": 400, "middle": 1100, "high": 2600}
WAVEFORM = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "classifier_proj_size": 16,
    "conv_dim": (16, 16, 16), "conv_kernel": (10, 8, 4), "conv_stride": (8, 5, 4), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_length": 4, "mask_time_prob": 0.05,
    "layerdrop": 0.0,
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "final_dropout", "feat_proj_dropout"), 0.0),
}  # fmt: skip
SPECTROGRAM = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8,
               "frequency_stride": 8, "time_stride": 8, "max_length": 40, "num_mel_bins": 16}  # fmt: skip


def sound_checkpoint(folder, family="Wav2Vec2", labels=tuple(TONES), seed=0, **config):
    """A wav2vec2, HuBERT or `AST` of two layers; `labels` as a number: LABEL_0, LABEL_1, …

    `feat_extract_norm="group"` (the default) takes no attention mask, `"layer"` does. An AST hears 0.415 s.
    """
    import transformers

    names = {"num_labels": labels} if isinstance(labels, int) else {
        "id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)},
    }  # fmt: skip
    is_ast = family == "AST"
    with seeded(seed):
        made = getattr(transformers, f"{family}Config")(**((SPECTROGRAM if is_ast else WAVEFORM) | names | config))
        model = getattr(transformers, f"{family}For{'Audio' if is_ast else 'Sequence'}Classification")(made)
    if is_ast:
        extractor = transformers.ASTFeatureExtractor(
            sampling_rate=RATE, num_mel_bins=made.num_mel_bins, max_length=made.max_length
        )
    else:
        extractor = transformers.Wav2Vec2FeatureExtractor(
            sampling_rate=RATE, return_attention_mask=made.feat_extract_norm == "layer"
        )
    return save_transformers(model, folder, extractor)


def tone(draw, hertz, seconds):
    """A noisy tone, float32."""
    time = np.arange(round(RATE * seconds)) / RATE
    return (0.3 * np.sin(2 * np.pi * hertz * time) + draw.normal(0, 0.05, len(time))).astype(np.float32)


def sound_folder(folder, rows=8, splits=("train", "test"), names=tuple(TONES), seed=0):
    """`folder/SPLIT/CLASS/N.wav`: so many tones of 0.2 to 0.4 seconds in each class."""
    import soundfile

    for number, split in enumerate(splits):
        draw = np.random.default_rng([seed, number])
        for name, hertz in zip(names, TONES.values(), strict=True):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for row in range(rows):
                clip = tone(draw, hertz * draw.uniform(0.8, 1.25), draw.choice([0.2, 0.25, 0.4]))
                soundfile.write(place / f"{row:03}.wav", clip, RATE)
    return folder
