"""causal-lm on conversations: the checkpoint's chat template writes them, and the answers are learned."""

import json
import math

import builders
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chats import MARKED, TEMPLATES, chat_checkpoint, chat_file, turns, unmarked
from conftest import SHORT
from outputs import report_of, same
from runs import stop_after
from torch.nn import functional as F

from dsd_refine.data.conversations import read_conversation
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.tasks.inputs.chats import ChatTemplate

QUIET = (*SHORT, "--batch-size", "4", "--control", "none", "--quiet")
TALK = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a dog sees"}]


def tokenizer(template=MARKED):
    found = builders.word_tokenizer()
    found.chat_template = template
    return found


def answers_of(template, messages, **how):
    """The words that are learned."""
    reader = tokenizer(template)
    written = ChatTemplate(reader).write(read_conversation(["messages"], [messages]), **how)
    return reader.convert_ids_to_tokens(written.ids[written.asked])


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("seed", range(12))
def test_marks_and_beginnings_find_the_same_answers(name, seed):
    draw = np.random.default_rng(seed)
    talk = read_conversation(["messages"], [turns(draw, 1 + seed % 3, system=seed % 2 == 0)])
    by_marks, by_text = (ChatTemplate(tokenizer(TEMPLATES[name])).write(talk, by_marks=how) for how in (True, False))
    without = ChatTemplate(tokenizer(unmarked(TEMPLATES[name]))).write(talk)
    assert np.array_equal(by_marks.ids, without.ids)
    assert np.array_equal(by_marks.asked, by_text.asked)
    assert np.array_equal(by_marks.asked, without.asked)
    assert by_marks.asked.sum() > 0


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("by_marks", [None, False])
def test_texts_in_parts_are_read_by_every_template(name, by_marks):
    """Several parts are joined by a new line, as servers of such models do."""
    template, (asking, answer) = ChatTemplate(tokenizer(TEMPLATES[name])), ("w1 w2\nw3", "w4 w5")
    plain = [{"role": "user", "content": asking}, {"role": "assistant", "content": answer}]
    parts = [{**each, "content": [{"type": "text", "text": text} for text in each["content"].split("\n")]} for each in plain]
    wanted, found = (template.write(read_conversation(("messages",), (talk,)), by_marks) for talk in (plain, parts))
    assert (found.text, found.ids.tolist(), found.asked.tolist()) == (wanted.text, wanted.ids.tolist(), wanted.asked.tolist())


def test_the_answer_with_the_token_that_ends_it_is_learned_and_nothing_else():
    assert answers_of(MARKED, TALK) == ["a", "dog", "sees", "[SEP]"]
    assert answers_of(unmarked(MARKED), TALK + TALK) == ["a", "dog", "sees", "[SEP]"] * 2


def test_a_template_that_writes_more_into_the_last_answer_is_understood():
    """As Qwen3's, which puts an empty <think> into the last answer alone."""
    template = unmarked(MARKED).replace(
        "{{ m.content + ' [SEP]' }}", "{{ ('here then ' if loop.last else '') + m.content + ' [SEP]' }}"
    )
    assert answers_of(template, TALK + TALK) == ["a", "dog", "sees", "[SEP]", "here", "then", "a", "dog", "sees", "[SEP]"]


def test_a_template_that_ends_the_text_where_nothing_follows_is_understood():
    """As Phi-4's, which writes one more token then."""
    template = unmarked(MARKED) + "{% if not add_generation_prompt %}{{ '[MASK]' }}{% endif %}"
    assert answers_of(template, TALK + TALK) == ["a", "dog", "sees", "[SEP]"] * 2 + ["[MASK]"]


def test_a_template_that_opens_a_thought_when_it_asks_is_understood():
    """As DeepSeek-R1's, whose answers in a conversation have none."""
    template = unmarked(MARKED).replace("'[CLS] assistant ' }}", "'[CLS] assistant [MASK]\n' }}")
    start = [TALK[0], {"role": "assistant", "content": "[ a dog"}]  # it begins as the mark of a thought does
    assert answers_of(template, start + TALK) == ["[UNK]", "a", "dog", "[SEP]", "a", "dog", "sees", "[SEP]"]


def test_a_template_that_changes_what_came_before_is_a_reason_to_skip():
    template = "{{ messages | length }} " + unmarked(MARKED)
    with pytest.raises(DataError, match="the chat template writes what comes before message 2 in another way"):
        answers_of(template, TALK + TALK)


def test_the_template_alone_writes_special_tokens():
    plain = tokenizer(TEMPLATES["like Llama, with a first token"])
    written = ChatTemplate(plain).write(read_conversation(["messages"], [TALK]))
    assert plain("the cat")["input_ids"][0] == plain.cls_token_id  # texts get one from the tokenizer
    assert written.ids[0] == plain.cls_token_id != written.ids[1]


def test_the_date_that_a_template_writes_stands_still():
    template = ChatTemplate(tokenizer("{{ strftime_now('%d %b %Y') + ' ' }}" + MARKED))
    assert template.write(read_conversation(["messages"], [TALK])).text.startswith("26 Jul 2024 ")
    assert "date of the day" in template.warnings()[0]
    assert ChatTemplate(tokenizer()).warnings() == []


def test_every_form_of_a_row_is_the_same_conversation():
    asked, answer = TALK[0]["content"], TALK[1]["content"]
    rows = [
        {"messages": TALK},
        {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]},
        {"prompt": asked, "completion": answer},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"instruction": asked, "output": answer},
        {"instruction": asked, "input": " ", "output": answer},
        {"instruction": asked, "context": "", "response": answer},
        {"messages": json.dumps(TALK)},
    ]
    found = [read_conversation(list(row), list(row.values())) for row in rows]
    assert all(talk == found[0] for talk in found)
    assert found[0].answers == (1,)
    for names in (["instruction", "input", "output"], ["instruction", "context", "response"]):
        with_input = read_conversation(names, ["now", "the cat", "a dog"])
        assert [message["content"] for message in with_input.messages] == ["now\n\nthe cat", "a dog"]


def test_of_a_prompt_that_holds_answers_only_the_completion_is_learned():
    talk = read_conversation(["prompt", "completion"], [TALK + TALK[:1], [{"role": "assistant", "content": "fish"}]])
    written = ChatTemplate(tokenizer()).write(talk)
    assert tokenizer().convert_ids_to_tokens(written.ids[written.asked]) == ["fish", "[SEP]"]


def test_tools_and_their_calls_reach_the_template():
    template = (
        "{% for t in tools or [] %}{{ t.name + ' ' }}{% endfor %}"
        "{% for m in messages %}{% if m.tool_calls %}{% generation %}{{ m.tool_calls[0].name + ' [SEP] ' }}{% endgeneration %}"
        "{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "dog", "arguments": None}]}
    said = [TALK[0], call, {"role": "tool", "content": "fish"}, {"role": "assistant", "content": "good"}]
    talk = read_conversation(["messages", "tools"], [said, '[{"name": "bird"}]'])
    assert talk.tools == [{"name": "bird"}]
    assert "content" not in talk.messages[1]
    assert ChatTemplate(tokenizer(template)).write(talk).text == "bird the cat dog [SEP] fish good "


@pytest.mark.parametrize("end", ["", "{% if not add_generation_prompt %}{{ '[MASK]' }}{% endif %}"])
def test_calls_of_tools_are_answers_too(end):
    template = (
        "{% for m in messages %}{{ '[CLS] ' + m.role + ' ' }}{% if m.tool_calls %}{{ 'sees ' + m.tool_calls[0].name }}"
        "{% else %}{{ m.content }}{% endif %}{{ ' [SEP]\n' }}{% endfor %}{% if add_generation_prompt %}[CLS] assistant {% endif %}"
    )
    call = {"role": "assistant", "tool_calls": [{"name": "dog"}]}
    said = [TALK[0], call, {"role": "tool", "content": "fish"}, {"role": "assistant", "content": "good"}]
    found = answers_of(template + end, said)
    assert found[:5] == ["sees", "dog", "[SEP]", "good", "[SEP]"]
    assert found[5:] == ["[MASK]"] * bool(end)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (TALK[:1], "ends with a message of the user: no answer follows"),
        (TALK + TALK[:1], "ends with a message of the user: no answer follows"),
        ([TALK[0], {"role": "assistant", "content": " "}], "message 2 is an empty answer"),
        ([], "no messages"),
        (None, "no messages"),
        ([{"content": "the"}], "message 1 does not say whose it is"),
        (["the"], "message 1 is no mapping"),
        ("[{'role': 'user'}]", "its messages are a text that is no JSON list"),
    ],
)
def test_conversations_that_teach_nothing_are_refused_with_the_reason(messages, reason):
    with pytest.raises(DataError, match=reason):
        read_conversation(["messages"], [messages])


def test_a_tokenizer_without_a_template_is_refused_with_the_remedy(refused, made, tmp_path):
    said = refused(made / "gpt2", "--data", chat_file(tmp_path / "d.jsonl"), *QUIET, "-o", tmp_path / "out")
    assert "its tokenizer has no chat template" in said
    assert "chat_template.jinja" in said
    with pytest.raises(CheckpointError, match="no chat template"):
        ChatTemplate(builders.word_tokenizer())


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A model with a chat template, and conversations."""
    place = tmp_path_factory.mktemp("chat")
    chat_checkpoint(place / "model")
    chat_checkpoint(place / "unmarked", unmarked(MARKED))
    chat_file(place / "talk.jsonl")
    return place


def run(command, model, data, out, *more):
    found = command(model, "--data", data, "-o", out, *QUIET, *more)
    assert found.code == 0, found.err
    return report_of(out)


def test_the_command_refines_on_conversations(command, chat, tmp_path):
    report = run(command, chat / "model", chat / "talk.jsonl", tmp_path / "out")
    assert report["data"]["columns"] == {"text": "messages"}
    assert report["metric"] == {"name": "loss", "higher_is_better": False}
    again = command("verify", chat / "model", tmp_path / "out")
    assert again.code == 0, again.out
    assert (tmp_path / "out/chat_template.jinja").read_bytes() == (chat / "model/chat_template.jinja").read_bytes()
    other = run(command, chat / "unmarked", chat / "talk.jsonl", tmp_path / "other")
    assert other["arms"] == report["arms"]  # the same answers are found without marks


def test_lists_that_are_written_as_json_texts_are_conversations(command, refused, chat, tmp_path):
    """Lists as Python writes them are refused: as texts they would be trained on, brackets and all."""
    rows = [json.loads(line)["messages"] for line in (chat / "talk.jsonl").read_text().splitlines()]
    pq.write_table(pa.table({"messages": [json.dumps(row) for row in rows]}), tmp_path / "d.parquet")
    arms = [
        run(command, chat / "model", data, tmp_path / "out", "--overwrite")["arms"]
        for data in (chat / "talk.jsonl", tmp_path / "d.parquet")
    ]
    assert arms[0] == arms[1]
    said = refused(chat / "model", "--data", write(tmp_path / "d.jsonl", *({"messages": repr(row)} for row in rows)), *QUIET)
    assert "16 its messages are a text that is no JSON list" in said


def test_rows_of_other_names_are_refused_with_what_would_do(refused, chat, tmp_path):
    row = {"chosen": "a dog", "rejected": "a cat"}
    said = refused(chat / "model", "--data", write(tmp_path / "d.jsonl", *[row] * 9), *QUIET)
    assert "prompt+completion, instruction+output" in said
    assert "chosen and rejected are pairs for a reward model, whose head has one output" in said
    said = refused(chat / "model", "--data", write(tmp_path / "d.jsonl", *[{"q": "a dog", "a": "a cat"}] * 9), *QUIET)
    assert "or a question and its answer: --text-column QUESTION,ANSWER" in said
    texts = write(tmp_path / "texts.jsonl", *[{"text": f"the cat {n}"} for n in range(3)])
    said = refused(chat / "model", "--data", chat / "talk.jsonl", "--eval-data", texts, *QUIET)
    assert "no usable rows in --eval-data: 3 rows were skipped (3 ends with a message of the user" in said


def test_the_loss_is_that_of_the_answers_tokens(command, chat, tmp_path):
    """Computed here anew, one conversation at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = run(command, chat / "model", chat / "talk.jsonl", tmp_path / "out", "--sparse-steps", 0, "--dense-steps", 0)
    table = pq.read_table(tmp_path / "out/dsd/predictions.parquet").to_pydict()
    rows = [json.loads(line) for line in (chat / "talk.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(chat / "model").eval()
    reader = AutoTokenizer.from_pretrained(chat / "model")
    sums, counts = [], []
    for row in table["row"]:
        found = reader.apply_chat_template(rows[row]["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids, asked = torch.tensor([found["input_ids"]]), torch.tensor(found["assistant_masks"], dtype=torch.bool)
        with torch.no_grad():
            losses = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")[asked[1:]]
        sums.append(float(losses.sum()))
        counts.append(len(losses))
    assert table["count_baseline"] == counts
    assert np.allclose(table["score_baseline"], sums, rtol=1e-4)
    assert math.isclose(report["arms"]["baseline"]["loss"], sum(sums) / sum(counts), rel_tol=1e-4)
    assert math.isclose(report["arms"]["baseline"]["perplexity"], math.exp(sum(sums) / sum(counts)), rel_tol=1e-3)


def test_all_tokens_are_learned_if_asked(command, chat, tmp_path):
    run(command, chat / "model", chat / "talk.jsonl", tmp_path / "out")
    run(command, chat / "model", chat / "talk.jsonl", tmp_path / "all", "--set", "loss_on=all")
    answers, every = (
        pq.read_table(tmp_path / name / "dsd/predictions.parquet")["count_refined"].to_numpy() for name in ("out", "all")
    )
    assert (every > answers).all()


def test_stopped_and_resumed(command, chat, tmp_path):
    one, two = ([chat / "model", "--data", chat / "talk.jsonl", "-o", tmp_path / name, *QUIET] for name in ("one", "two"))
    assert command(*one).code == 0
    for at in (2, 2):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, at)
            assert command(*two, "--resume").code == 4
    assert command(*two, "--resume").code == 0
    same(tmp_path / "one", tmp_path / "two")


def test_long_and_unusable_conversations_are_counted_and_named(command, chat, tmp_path):
    rows = [json.loads(line) for line in (chat / "talk.jsonl").read_text().splitlines()]
    late = [{"role": "user", "content": "the cat " * 20}, TALK[1]]
    odd = [{"messages": late}, {"messages": TALK[:1]}]
    data = write(tmp_path / "d.jsonl", *({**row, "images": ["a.png"]} for row in (*rows, *odd)))
    report = run(command, chat / "model", data, tmp_path / "out", "--max-length", 12)
    skipped = {item["row"]: item["reason"] for item in report["data"]["train"]["skipped"]}
    assert skipped[16] == "no answer within 12 tokens (--max-length)"
    assert skipped[17] == "ends with a message of the user: no answer follows"
    assert any("conversations are longer than 12 tokens" in line for line in report["warnings"])
    assert any("the column 'images' is not read: models that see pictures" in line for line in report["warnings"])


def test_roles_that_a_template_refuses_are_skipped_and_named(command, tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + MARKED
    model = chat_checkpoint(tmp_path / "model", template)
    report = run(command, model, chat_file(tmp_path / "talk.jsonl", rows=20), tmp_path / "out")
    reasons = {item["reason"] for item in report["data"]["train"]["skipped"]}
    assert reasons == {"the chat template refuses it (no system here)"}
    assert len(report["data"]["train"]["skipped"]) == 7


def test_columns_that_could_each_be_meant_are_refused(refused, command, chat, tmp_path):
    rows = [{"messages": turns(np.random.default_rng(n), 1), "text": f"the cat {n}"} for n in range(12)]
    data = write(tmp_path / "d.jsonl", *rows)
    said = refused(chat / "model", "--data", data, *QUIET, "-o", tmp_path / "out")
    assert "messages or text could each be the text: name what is meant, as --text-column messages" in said
    report = run(command, chat / "model", data, tmp_path / "out", "--text-column", "messages")
    assert report["data"]["unused"] == ["columns not used: text"]


def test_options_that_conversations_have_no_use_for_are_refused(refused, chat, made, tmp_path):
    args = ("--data", chat / "talk.jsonl", *QUIET, "-o", tmp_path / "out")
    assert "a conversation is one window" in refused(chat / "model", *args, "--stride", 4)
    assert "these are conversations" in refused(chat / "model", *args, "--set", "join=all")
    texts = ("--data", made / "documents.txt", *QUIET, "-o", tmp_path / "out")
    assert "loss_on: answers: is of conversations" in refused(made / "gpt2", *texts, "--set", "loss_on=answers")
    said = refused(made / "bert", "--data", made / "texts.csv", *QUIET, "-o", tmp_path / "out", "--set", "loss_on=all")
    assert "loss_on: text-classification has no use for it" in said


def test_a_question_and_its_answer_in_columns_of_other_names(command, chat, tmp_path):
    draw = np.random.default_rng(0)
    rows = [{"q": turn[0]["content"], "a": turn[1]["content"]} for turn in (turns(draw, 1) for _ in range(16))]
    report = run(command, chat / "model", write(tmp_path / "d.jsonl", *rows), tmp_path / "out", "--text-column", "q,a")
    assert report["data"]["columns"] == {"text": "q,a"}
    assert report["data"]["train"]["skipped"] == []
