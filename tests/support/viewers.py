"""Tiny models that read pictures and write texts, with a word-level tokenizer and a chat template of their kind."""

import json

import builders
import numpy as np
from builders import SPECIAL, WORDS, save_transformers, seeded
from PIL import Image

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


TILES = [f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)]
OF_PICTURES = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *TILES]

# as Idefics3's: a content is a text, or a list of parts
MESSAGES = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "{{ '[CLS] ' + m.role + ' ' }}"
    "{% if m.role == 'assistant' %}{% generation %}BODY{% endgeneration %}{% else %}BODY{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[CLS] assistant ' }}{% endif %}"
)
BODY = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<end_of_utterance>' }}"
)
MARKED_CHAT = MESSAGES.replace("BODY", BODY)
CHAT = MARKED_CHAT.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def picture_chat_checkpoint(folder, template=CHAT, splits=False, seed=0, **config):
    """An Idefics3 of two layers with its processor: a picture is 4 tokens in 3 others, or with `splits` up to 5 tiles of 4."""
    import transformers

    words = {word: number for number, word in enumerate([*SPECIAL, *WORDS, "user", "assistant", *OF_PICTURES])}
    tokenizer = builders.word_tokenizer(list(words)[len(SPECIAL) :])
    tokenizer.add_special_tokens({"additional_special_tokens": OF_PICTURES})
    tokenizer.model_max_length, tokenizer.bos_token, tokenizer.eos_token = 128, "[CLS]", "<end_of_utterance>"
    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=splits, resample=2,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    text = {**TEXT, "vocab_size": len(words), "max_position_embeddings": 128, "model_type": "llama"}
    sizes = {"text_config": text, "vision_config": VISION, "scale_factor": 2, "image_token_id": words["<image>"]}
    with seeded(seed):
        model = transformers.Idefics3ForConditionalGeneration(transformers.Idefics3Config(**sizes, **config, pad_token_id=0))
    save_transformers(model, folder, processor, images)  # with the older preprocessor_config.json too
    return folder


def picture(number, size=(24, 24)):
    """A picture of one colour with a stripe."""
    draw = np.random.default_rng(number)
    pixels = np.full((*size, 3), draw.integers(0, 256, 3), dtype=np.uint8)
    pixels[number % size[0]] = 255
    return Image.fromarray(pixels)


def said(role, *parts):
    """A message: texts, and None where a picture stands, or the path of one in a list."""

    def part(value):
        if isinstance(value, str):
            return {"type": "text", "text": value}
        return {"type": "image"} if value is None else {"type": "image", "path": value[0]}

    return {"role": role, "content": [part(value) for value in parts]}


def picture_chat(folder, rows=16, seed=0):
    """`folder/rows.jsonl`: questions about pictures beside it, in three forms, and some without a picture."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in range(rows):
        question, answer = (" ".join(draw.choice(WORDS, draw.integers(1, 4))) for _ in range(2))
        shown = [] if row % 5 == 4 else [[f"{row}.png"]]
        later = [[f"{(row + 1) % rows}.png"]] if row % 6 == 3 else []
        messages = [said("user", *shown, question), said("assistant", answer)]
        if row % 3 == 0:
            messages += [said("user", "and", *later), said("assistant", "now")]
        for (name,) in (*shown, *later):
            picture(int(name.removesuffix(".png"))).save(folder / name)
        lines.append(json.dumps({"messages": messages}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "rows.jsonl"
