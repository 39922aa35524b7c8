"""Streaming: whole characters, nothing of a stop string, and in the end the text of all tokens."""

import random

import pytest
import torch
from transformers import GenerationConfig

from mini_llm.data import load_tokenizer
from mini_llm.data.tokenizer import DEFAULT_TOKENIZER
from mini_llm.inference.generator import Generator
from mini_llm.inference.sampling import Sampling
from mini_llm.inference.text import StopStrings, Thoughts, TokenText
from mini_llm.models import preset_config


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEFAULT_TOKENIZER)


class Scripted(torch.nn.Module):
    """A causal model that says what it is told, token by token, whatever it reads."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.config = preset_config("mini_llama3_tiny", vocab_size=32_004)
        self.generation_config = GenerationConfig(eos_token_id=0)
        self.device, self.tokens, self.steps = torch.device("cpu"), tokens, 0

    def forward(self, input_ids, **_):
        logits = torch.zeros(len(input_ids), 1, self.config.vocab_size)
        logits[:, :, self.tokens[self.steps % len(self.tokens)]] = 9.0
        self.steps += 1
        return type("Output", (), {"logits": logits})


TEXT = "从前有座山，🧑‍🚀👩🏽‍💻 and 龘靐齉, naïve café\n\tend"


def say(tokenizer, text, **sampling):
    tokens = tokenizer(text)["input_ids"]
    settings = {"temperature": 0, "max_new_tokens": len(tokens), **sampling}
    return Generator(Scripted(tokens), tokenizer), Sampling(**settings), tokens


def test_a_streamed_piece_never_ends_within_a_character(tokenizer):
    generator, sampling, tokens = say(tokenizer, TEXT)
    partial = [tokenizer.decode([token]) for token in tokens]
    assert sum("\ufffd" in piece for piece in partial) > 10  # characters of several tokens
    stream = generator.stream("x", sampling)
    pieces = list(stream)
    assert "".join(pieces) == stream.text == TEXT and stream.token_ids == tokens
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 20  # and it does not wait until the end
    assert stream.finish_reason == "length"


def test_a_character_that_stays_unfinished_is_replaced_at_the_end(tokenizer):
    tokens = tokenizer("好🧑")["input_ids"]
    assert len(tokenizer("🧑")["input_ids"]) > 1
    text = TokenText(tokenizer)
    shown = "".join(text.add(token) for token in tokens[:-1])
    assert shown == "好" and text.rest() == "\ufffd"


def test_pieces_of_any_tokens_join_to_the_text_of_all(tokenizer):
    draw = random.Random(0)
    for _ in range(60):
        tokens = [draw.randrange(1, 400 if draw.random() < 0.5 else 32_000) for _ in range(30)]
        text = TokenText(tokenizer)
        joined = "".join(text.add(token) for token in tokens) + text.rest()
        assert joined == tokenizer.decode(tokens)


def test_a_stop_string_over_several_tokens_ends_the_text_before_it_and_never_shows(tokenizer):
    text = "甲乙丙 one two three<stop here> and more"
    for stop in ("<stop here>", "two three<", "wo thr", "乙丙 o"):
        generator, sampling, tokens = say(tokenizer, text, stop=(stop, "not there"))
        stream = generator.stream("x", sampling)
        pieces = list(stream)
        assert "".join(pieces) == text[: text.index(stop)], stop
        assert stream.finish_reason == "stop" and len(stream.token_ids) < len(tokens)
        generator, sampling, _ = say(tokenizer, text, stop=(stop,))
        (result,) = generator.generate(["x"], sampling)
        assert (result.text, result.finish_reason) == (text[: text.index(stop)], "stop")


def test_what_only_looked_like_a_stop_string_is_shown_after_all(tokenizer):
    text = "see <stop the press and <sto"
    generator, sampling, _ = say(tokenizer, text, stop=("<stop here>",))
    stream = generator.stream("x", sampling)
    assert "".join(stream) == text and stream.finish_reason == "length"


def test_stop_strings_are_found_wherever_the_text_is_cut():
    text, stop = "abcabdabcabc!x", "abcabc!"
    for cut in range(len(text)):
        for second in range(cut, len(text)):
            stops, shown, found = StopStrings([stop]), "", False
            for piece in (text[:cut], text[cut:second], text[second:]):
                if not found:
                    more, found = stops.add(piece)
                    shown += more
            assert found and shown == text[: text.index(stop)]


def test_a_special_token_as_stop_string_is_that_token(tokenizer):
    text = "one<|im_end|>two"
    generator, sampling, tokens = say(tokenizer, text, stop=("<|im_end|>",), stop_token_ids=())
    (result,) = generator.generate(["x"], sampling)
    assert (result.text, result.finish_reason) == ("one", "stop")
    assert result.token_ids == tokens[: tokens.index(32_001) + 1]


def test_thoughts_are_told_from_the_answer_wherever_the_text_is_cut():
    text = "a<think>b < c</think>d<thin"
    expected = [("a", False), ("<think>b < c</think>", True), ("d<thin", False)]
    for cut in range(len(text)):
        for second in range(cut, len(text)):
            thoughts = Thoughts("<think>", "</think>", inside=False)
            parts = []
            for piece in (text[:cut], text[cut:second], text[second:]):
                parts += thoughts.add(piece)
            joined = [["", False]]
            for part, inside in parts + thoughts.rest():
                if joined[-1][1] != inside:
                    joined.append(["", inside])
                joined[-1][0] += part
            assert [tuple(part) for part in joined] == expected
