"""Conversations: which are valid, and that exactly the answers and their ends are supervised."""

from __future__ import annotations

import codecs
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_llm.data.conversation_files import Found, from_record, parse_line, read_lines
from mini_llm.data.conversations import (
    ChatEncoder,
    Conversation,
    count_answers,
    why_invalid,
    without_last_exchange,
)
from mini_llm.data.text_files import Rejected
from mini_llm.data.tokenizer import load_tokenizer, train_tokenizer

BASE = 400
IM_START, IM_END, THINK, THINK_END = BASE, BASE + 1, BASE + 2, BASE + 3
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
WORDS = ["row", "packing", "训练", "模型", "数据", "x = 1", "don't", "3.14", "é", "😀", "end."]
# Texts that would be control tokens if they were parsed.
QUOTED = ["<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<think>", "</think>"]
WHITE_SPACE = [" ", "\n", "\n\n", "  \n", "\t", "\u3000", "\r\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=12)) + "user system assistant\n" for _ in range(300)]
    many = [text + " ".join(draw.choices("abcdefghij", k=30)) for text in texts]
    words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(200)]
    train_tokenizer([*many, " ".join(words * 3)], BASE).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> ChatEncoder:
    return ChatEncoder(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


def encoded(messages: Conversation, encoder: ChatEncoder) -> tuple[np.ndarray, np.ndarray]:
    found = encoder.encode(messages)
    return found.input_ids, found.labels


def random_text(draw: random.Random, ordinary: bool) -> str:
    text = " ".join(draw.choices(WORDS, k=draw.randint(1, 8)))
    if ordinary:
        return text
    if draw.random() < 0.4:
        text = draw.choice(WHITE_SPACE) * draw.randint(1, 2) + text
    if draw.random() < 0.4:
        text = text + draw.choice(QUOTED) + draw.choice(WORDS)
    return text + draw.choice(["", *WHITE_SPACE])


def random_conversation(
    draw: random.Random, ordinary: bool = False
) -> tuple[Conversation, list[str], int]:
    """Return a conversation, what it should supervise, and its number of <think> blocks."""
    messages: list[Any] = []
    expected, thoughts = [], 0
    if draw.random() < 0.3:
        messages.append({"role": "system", "content": random_text(draw, ordinary)})
    answers = draw.randint(1, 4)
    for turn in range(answers):
        messages.append({"role": "user", "content": random_text(draw, ordinary)})
        answer = random_text(draw, ordinary)
        message = {"role": "assistant", "content": answer}
        style = draw.choice(["none", "none", "content", "field"])
        thought = " ".join(draw.choices(WORDS, k=3))
        if style == "content":
            message["content"] = f"<think>\n{thought}\n</think>\n\n{answer}"
        elif style == "field":
            message["reasoning_content"] = thought
        if style != "none" and turn == answers - 1:
            answer, thoughts = f"<think>\n{thought}\n</think>\n\n{answer}", 1
        messages.append(message)
        expected.append(answer + "<|im_end|>")
    return messages, expected, thoughts


def spans(input_ids: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """Slow: the runs of supervised tokens, each up to an <|im_end|>."""
    found: list[list[int]] = []
    inside = False
    for token, label in zip(input_ids.tolist(), labels.tolist(), strict=True):
        if label == -100:
            inside = False
            continue
        assert label == token
        if not inside:
            found.append([])
        inside = True
        found[-1].append(token)
    return found


def test_no_label_is_wrong_in_2500_conversations(encoder: ChatEncoder, tokenizer: Any) -> None:
    draw = random.Random(1)
    counted = {"white space first": 0, "quoted": 0, "thoughts": 0}
    for _ in range(2500):
        messages, expected, thoughts = random_conversation(draw)
        input_ids, labels = encoded(messages, encoder)
        assert input_ids.dtype == labels.dtype == np.int32
        supervised = spans(input_ids, labels)
        assert [tokenizer.decode(span) for span in supervised] == expected
        # Every token and not one more: the whole is the rendered template.
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(input_ids.tolist()) == rendered
        # Control tokens are the template's; those that a text spells out are bytes.
        ids = input_ids.tolist()
        assert ids.count(IM_START) == ids.count(IM_END) == len(messages)
        assert ids.count(THINK) == ids.count(THINK_END) == thoughts
        assert 0 not in ids
        assert all(span[-1] == IM_END and span.count(IM_END) == 1 for span in supervised)
        answers = [text.removesuffix("<|im_end|>") for text in expected]
        counted["white space first"] += any(text[:1].isspace() for text in answers)
        counted["quoted"] += any(q in m["content"] for m in messages for q in QUOTED[:3])
        counted["thoughts"] += thoughts
    assert min(counted.values()) > 300, counted


def test_ordinary_text_gives_what_apply_chat_template_gives(
    encoder: ChatEncoder, tokenizer: Any
) -> None:
    draw = random.Random(2)
    for _ in range(300):
        messages, _, _ = random_conversation(draw, ordinary=True)
        stock = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        input_ids, labels = encoded(messages, encoder)
        assert input_ids.tolist() == stock["input_ids"]
        assert (labels != -100).astype(int).tolist() == stock["assistant_masks"]


def test_whole_text_encoding_would_merge_white_space_where_segments_do_not(
    encoder: ChatEncoder, tokenizer: Any
) -> None:
    messages: Conversation = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "\n\nHello"},
    ]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    input_ids, labels = encoded(messages, encoder)
    assert input_ids[: len(prompt)].tolist() == prompt  # what inference hands to the model
    assert (labels[: len(prompt)] == -100).all() and labels[len(prompt)] != -100


def test_both_spellings_of_thoughts_give_the_same_tokens(encoder: ChatEncoder) -> None:
    inline = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes </think> <think>"}
    field = {"role": "assistant", "content": "Yes </think> <think>", "reasoning_content": "hm"}
    both = [encoded([USER, answer], encoder) for answer in (inline, field)]  # type: ignore[list-item]
    assert np.array_equal(both[0], both[1])
    ids = both[0][0].tolist()
    assert ids.count(THINK) == ids.count(THINK_END) == 1  # those inside the answer are text


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
        min_size=2,
        max_size=6,
    ).filter(lambda texts: len(texts) % 2 == 0)
)
def test_any_text_is_supervised_exactly_where_the_assistant_speaks(texts: list[str]) -> None:
    encoder, tokenizer = _shared()
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    if why_invalid(messages):  # thoughts alone
        return
    input_ids, labels = encoded(messages, encoder)  # type: ignore[arg-type]
    decoded = [tokenizer.decode(span) for span in spans(input_ids, labels)]
    assert decoded == [text + "<|im_end|>" for text in texts[1::2]]


def test_header_line_end_and_questions_are_never_supervised(encoder: ChatEncoder) -> None:
    input_ids, labels = encoded([USER, ANSWER], encoder)  # type: ignore[list-item]
    assert labels[0] == -100 and labels[-1] == -100 and input_ids[-2] == IM_END
    assert 0 not in input_ids  # no <|endoftext|>


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no_messages"),
        ([USER], "no_assistant_turn"),
        ([ANSWER], "roles_out_of_order"),
        ([USER, USER, ANSWER], "roles_out_of_order"),
        ([USER, ANSWER, ANSWER], "roles_out_of_order"),
        ([USER, {"role": "system", "content": "x"}, ANSWER], "roles_out_of_order"),
        ([USER, ANSWER, USER], "ends_without_answer"),
        ([{"role": "user", "content": " "}, ANSWER], "empty_user_turn"),
        ([USER, {"role": "assistant", "content": "\n"}], "empty_assistant_turn"),
        ([{"role": "system", "content": ""}, USER, ANSWER], "empty_system_turn"),
        ([USER, {"role": "tool", "content": "x"}, ANSWER], "role_tool"),
        ([{"role": "made up", "content": "x"}], "role_other"),
        ([USER, {**ANSWER, "tool_calls": [{}]}], "tool_calls"),
        ([USER, {"role": "assistant", "content": None}], "content_not_a_string"),
        ([USER, {"role": "assistant", "content": "\ud800"}], "invalid_unicode"),
        ([USER, "Hello"], "message_not_an_object"),
        ([USER, {**ANSWER, "content": "<think>a</think>b", "reasoning_content": "c"}],
         "thoughts_twice"),
        ([USER, {"role": "assistant", "content": "<think>a</think>\n"}], "thoughts_without_answer"),
        ([{**USER, "reasoning_content": "c"}, ANSWER], "thoughts_of_another_role"),
        ([{"role": "system", "content": "x"}, USER, ANSWER], None),
    ],
)  # fmt: skip
def test_every_bad_conversation_is_refused_by_name(
    encoder: ChatEncoder, messages: list[Any], reason: str | None
) -> None:
    assert why_invalid(messages) == reason
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            encoded(messages, encoder)


def test_truncation_takes_whole_exchanges_from_the_end() -> None:
    system: Any = {"role": "system", "content": "x"}
    messages: Conversation = [system, USER, ANSWER, USER, ANSWER]  # type: ignore[list-item]
    shorter = without_last_exchange(messages)
    assert shorter == messages[:3] and why_invalid(shorter) is None
    assert count_answers(messages) == 2


def test_template_without_generation_marks_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    template = str(tokenizer.chat_template)
    for changed, message in (
        (template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", ""),
         r"--tokenizer: .* no \{% generation %\} marks"),
        (template.replace("assistant\\n'", "assistant:'"), "--tokenizer: .*another one than"),
        (None, "--tokenizer: .*has no chat template"),
    ):  # fmt: skip
        tokenizer.chat_template = changed
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(str(tmp_path))
        with pytest.raises(ValueError, match=message):
            ChatEncoder(tmp_path)


# Formats of the input


def found(record: dict[str, Any]) -> Found:
    result = from_record(record)
    assert isinstance(result, Found), result
    return result


def contents(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in found(record).messages]


def test_deepctrl_records_become_conversations_and_what_is_mended_is_named() -> None:
    record = {"id": 1, "instruction": "Sum", "input": "1, 2", "output": "3", "type": 7}
    record |= {"history": [["a", "b"], ["", ""], ["c", ""], ["d", "e"]], "language": "zh"}
    assert contents(record) == [
        ("user", "a"), ("assistant", "b"), ("user", "d"), ("assistant", "e"),
        ("user", "Sum\n1, 2"), ("assistant", "3"),
    ]  # fmt: skip
    assert found(record).kind == "7"
    assert found(record).mended == ("empty_history_exchange", "half_empty_history_exchange")
    record = {"instruction": "", "input": "Why?", "output": " So.", "history": None}
    assert contents(record) == [("user", "Why?"), ("assistant", " So.")]
    assert found(record).mended == ("empty_instruction",)
    assert found({"instruction": "Go", "input": "", "output": "x"}).mended == ("empty_input",)


def test_question_and_answer_keys_of_older_files_are_read() -> None:
    asked = [("user", "Why?"), ("assistant", "So.")]
    for keys in (("q", "a"), ("question", "answer"), ("prompt", "response")):
        record = dict(zip(keys, ("Why?", "So."), strict=True))
        assert contents(record) == asked
        assert found(record).mended == ("question_answer_keys",)
        assert contents({**record, "history": [record]}) == asked * 2


def test_messages_and_sharegpt_keep_system_and_thoughts() -> None:
    record: dict[str, Any] = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Yo"},
        ]
    }
    expected = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo")]
    assert contents(record) == expected
    messages = [{"role": role, "content": content} for role, content in expected]
    messages[-1]["reasoning_content"] = "hm"
    assert contents({"messages": messages}) == expected
    assert found({"messages": messages}).messages[-1]["reasoning_content"] == "hm"
    assert contents({"system": "Be brief.", "conversations": messages[1:]}) == expected
    messages[-1]["weight"] = 1
    assert contents({"messages": messages}) == expected


def test_records_of_several_kinds_written_together_are_read_by_the_fields_that_they_have() -> None:
    """As datasets and pandas write them, with null for what a record does not have."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    absent = dict.fromkeys(("messages", "conversations", "instruction", "input", "output"))
    for record in (
        {"messages": turns},
        {"conversations": turns},
        {"instruction": "Hi", "input": "", "output": "Yo"},
    ):
        assert contents({**absent, **record}) == [("user", "Hi"), ("assistant", "Yo")]


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_what_stands_beside_the_turns_counts_in_every_format(key: str) -> None:
    expected = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo")]
    turns = [{"role": role, "content": content} for role, content in expected[1:]]
    for record in (
        {"messages": turns},
        {"conversations": turns},
        {"instruction": "Hi", "input": "", "output": "Yo"},
        {"question": "Hi", "answer": "Yo"},
    ):
        assert contents({**record, key: "Be brief."}) == expected
        assert from_record({**record, "tools": [{"name": "search"}]}) == "tools"
    whole = [{"role": role, "content": content} for role, content in expected]
    assert contents({"messages": whole, key: "Be brief."}) == expected
    assert from_record({"messages": whole, key: "Be long."}) == "roles_out_of_order"


def test_a_byte_order_mark_before_the_first_line_costs_nothing() -> None:
    line = b'{"instruction": "a", "input": "", "output": "b"}\n'
    assert parse_line(codecs.BOM_UTF8 + line) == parse_line(line)
    assert isinstance(parse_line(line), Found)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken}\n", "invalid_json"),
        (b'{"instruction": "a", "inp', "truncated_line"),
        (b'{"output": "\xff"}\n', "not_utf8"),
        (b"\n", "empty_line"),
        (b"[1]\n", "not_an_object"),
        (b'{"text": "a"}\n', "wrong_fields"),
        (b'{"messages": 1}\n', "wrong_fields"),
        (b'{"instruction": "a", "input": "", "output": "b", "history": [["x"]]}\n', "wrong_fields"),
        (b'{"instruction": "a", "input": "", "output": ""}\n', "empty_assistant_turn"),
        (b'{"instruction": "", "input": "", "output": "b"}\n', "empty_user_turn"),
        (b'{"instruction": 1, "input": "", "output": "b"}\n', "content_not_a_string"),
        (b'{"instruction": "a", "input": "", "output": "\\ud800"}\n', "invalid_unicode"),
        (b'{"conversations": [{"from": "observation", "value": "x"}]}\n', "role_observation"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}\n', "tools"),
        (
            b'{"messages": [{"role": "user", "content": "x"}, '
            b'{"role": "assistant", "content": "bad", "weight": 0}]}\n',
            "answer_of_weight_0",
        ),
        (b"[" * 100_000 + b"\n", "invalid_json"),
    ],
)
def test_every_bad_line_is_rejected_by_name(line: bytes, reason: str) -> None:
    result = parse_line(line, place=7)
    assert isinstance(result, Rejected)
    assert (result.reason, result.place) == (reason, "byte 7")


def test_ranges_of_a_file_give_every_line_once(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"q": f"question {i}", "a": "x" * i}).encode() for i in range(50)]
    path.write_bytes(b"\n".join(lines))
    whole = list(read_lines(path, 0, path.stat().st_size))
    assert len(whole) == 50
    for cut in range(0, path.stat().st_size, 37):
        halves = [*read_lines(path, 0, cut), *read_lines(path, cut, path.stat().st_size)]
        assert halves == whole


_kept: list[Any] = []


def _shared() -> tuple[ChatEncoder, Any]:
    """Hypothesis runs one function many times; fixtures cannot be mixed in cheaply."""
    if not _kept:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            train_tokenizer([" ".join(WORDS) * 3], 270).save_pretrained(folder)
            _kept.extend([ChatEncoder(folder), load_tokenizer(folder)])
    return _kept[0], _kept[1]
