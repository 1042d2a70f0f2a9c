"""Chat templates of the forms that released models have, and rows of conversations."""

import json

import builders
import numpy as np
from builders import WORDS

MARKED = (
    "{% for m in messages %}{{ '[CLS] ' + m.role + ' ' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' [SEP]' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + ' [SEP]\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[CLS] assistant ' }}{% endif %}"
)
# what answers are written in, each with marks; `unmarked` takes these out
TEMPLATES = {
    "like ChatML": MARKED,
    "like Llama, with a first token": "{{ '[CLS] ' }}" + MARKED.replace("'[CLS] ", "'then "),
    "like Mistral, without a header": (
        "{{ '[CLS]' }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ ' ' + m.content + ' [SEP]' }}{% endgeneration %}"
        "{% else %}{{ ' now ' + m.content + ' then' }}{% endif %}{% endfor %}"
    ),
    "without an end": (
        "{% for m in messages %}{% if m.role == 'assistant' %}here {% generation %}{{ m.content + '\n' }}{% endgeneration %}"
        "{% else %}{{ 'now ' + m.content + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}here {% endif %}"
    ),
}


def unmarked(template):
    """The template without its marks."""
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def chat_checkpoint(folder, template=MARKED, seed=0, **config):
    """A GPT-2 of two layers, whose tokenizer has a chat template and adds [CLS] and [SEP] to plain texts."""
    builders.gpt2_checkpoint(folder, seed=seed, **{"n_positions": 64, **config})
    tokenizer = builders.word_tokenizer()
    tokenizer.chat_template, tokenizer.model_max_length = template, 64
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    tokenizer.save_pretrained(folder)
    return folder


def turns(draw, count=2, system=False):
    """A conversation of so many questions and answers of known words."""

    def said(role):
        return {"role": role, "content": " ".join(draw.choice(WORDS, draw.integers(1, 5)))}

    first = [said("system")] if system else []
    return first + [said(role) for _ in range(count) for role in ("user", "assistant")]


def chat_file(path, rows=16, seed=0):
    """A JSON-lines file of `messages`, one or two turns each."""
    draw = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"messages": turns(draw, 1 + row % 2, system=row % 3 == 0)}) for row in range(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
