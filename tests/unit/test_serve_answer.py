"""From tokens to the text of an answer: thoughts, stop strings, whole characters."""

from typing import Any

import pytest
from transformers.cli.serving.utils import ReasoningText

from mini_llm.data import load_tokenizer
from mini_llm.data.tokenizer import DEFAULT_TOKENIZER
from mini_llm.inference.serve.answer import AnswerText, Thoughts


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEFAULT_TOKENIZER)


def read(tokenizer: Any, text: AnswerText, said: str) -> tuple[str, str]:
    """(content, thoughts) of an answer that says ``said``, token by token."""
    pieces: list[str] = []
    for token in tokenizer(said)["input_ids"]:
        pieces += text.add(token)
        if text.stopped:
            break
    pieces += text.end()
    assert all(pieces), "an empty piece"
    content = "".join(piece for piece in pieces if not isinstance(piece, ReasoningText))
    return content, "".join(piece for piece in pieces if isinstance(piece, ReasoningText))


@pytest.mark.parametrize(
    ("said", "content", "thoughts"),
    [
        ("<think>\n先想\n再说\n</think>\n\n你好\n", "你好\n", "先想\n再说"),
        ("没有\n想法", "没有\n想法", ""),
        ("<think>\n想到一半", "", "想到一半"),
        ("<think>\n\n</think>\n\n空", "空", ""),
        ("前<think>\n中</think>后", "前后", "中"),
    ],
)
def test_thoughts_are_told_apart_without_the_line_breaks_of_their_marks(
    tokenizer: Any, said: str, content: str, thoughts: str
) -> None:
    text = AnswerText(tokenizer, [], Thoughts(tokenizer))
    assert read(tokenizer, text, said) == (content, thoughts)


def test_thoughts_that_the_template_began_are_thoughts(tokenizer: Any) -> None:
    thoughts = Thoughts(tokenizer)
    chat = [{"role": "user", "content": "<think>\n"}]

    def prompt(**options: bool) -> list[int]:
        encoded = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, **options
        )
        return list(encoded["input_ids"])

    assert thoughts.open_in(prompt(enable_thinking=True))
    assert not thoughts.open_in(prompt(enable_thinking=False))
    assert not thoughts.open_in(prompt()), "the user's own words began no thoughts"
    text = AnswerText(tokenizer, [], thoughts, thinking=True)
    assert read(tokenizer, text, "想\n</think>\n\n说") == ("说", "想")


def test_without_a_chat_the_marks_of_thoughts_are_text(tokenizer: Any) -> None:
    said = "<think>\n想\n</think>\n\n说"
    assert read(tokenizer, AnswerText(tokenizer, []), said) == (said, "")


def test_an_answer_ends_before_a_stop_string_that_several_tokens_make(tokenizer: Any) -> None:
    text = AnswerText(tokenizer, ["。完", "不在"])
    assert read(tokenizer, text, "春天来了。夏天也来了。完毕") == ("春天来了。夏天也来了", "")
    assert text.stopped
    text = AnswerText(tokenizer, ["。完"])
    assert read(tokenizer, text, "只有一半。") == ("只有一半。", "")
    assert not text.stopped


def test_a_character_of_several_tokens_comes_whole(tokenizer: Any) -> None:
    said = "𠀀龘🙂"
    tokens = tokenizer(said)["input_ids"]
    assert len(tokens) > len(said)
    text = AnswerText(tokenizer, [])
    pieces = [piece for token in tokens for piece in text.add(token)]
    assert "".join(pieces) == said
    assert not any("\ufffd" in piece for piece in pieces)
