"""Tiny models that read pictures and write texts, with a word-level tokenizer and a chat template of their kind."""

import json

import builders
from builders import SPECIAL, WORDS, save_transformers, seeded

IMAGE = len(SPECIAL) + len(WORDS)  # the id that stands for a picture
TEXT = {"vocab_size": IMAGE + 1, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
          "patch_size": 8}  # fmt: skip
SMOLVLM = {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": VISION, "scale_factor": 2}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
QWEN2_VL = {"text_config": {**TEXT, "rope_parameters": ROPE}, "vision_config": {
    "depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "patch_size": 8, "mlp_ratio": 2}}  # fmt: skip

# like SmolVLM's: a content that is no list of parts is not written
OF_PARTS = (
    "{% for m in messages %}{{ '[CLS] ' + m.role + ' ' }}{% for part in m.content %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] == 'image' %}{{ '[MASK]' }}{% endif %}{% endfor %}"
    "{{ ' [SEP]\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[CLS] assistant ' }}{% endif %}"
)


def viewer_checkpoint(folder, kind="smolvlm", sizes=SMOLVLM, template=OF_PARTS):
    """Such a model; its chat template lies in the processor's older file."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **sizes, image_token_id=IMAGE, pad_token_id=0)
    with seeded(0):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    tokenizer = builders.word_tokenizer()
    tokenizer.model_max_length, tokenizer.bos_token, tokenizer.eos_token = 64, "[CLS]", "[SEP]"
    save_transformers(model, folder, tokenizer)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return folder
