"""The tokenizer: ids, exact round trip, stock loading, fingerprint, chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mini_llm.data.tokenizer import (
    SPECIAL_TOKENS,
    fast_encoder,
    load_tokenizer,
    text_encoder,
    token_byte_lengths,
    tokenizer_fingerprint,
    train_tokenizer,
)

TEXT = "def read_rows(path):\n    return [line for line in path]\n\n中文手册页 1234 don't stop."
USER = {"role": "user", "content": "Hi"}


def training_texts() -> Iterator[str]:
    for word in ("alpha", "beta", "数据", "gamma"):
        yield f"{TEXT} {word} " * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(training_texts(), 300).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_special_ids_stand_where_the_design_puts_them(tokenizer: Any) -> None:
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == [0, 300, 301, 302, 303]
    assert len(tokenizer) == 304
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.bos_token_id is None
    assert tokenizer.padding_side == "left"
    assert tokenizer.clean_up_tokenization_spaces is False


def test_encoding_adds_no_special_token(tokenizer: Any) -> None:
    assert not set(tokenizer("plain text")["input_ids"]) & {0, 300, 301, 302, 303}
    assert set(tokenizer("plain text")) == {"input_ids", "attention_mask"}


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_gives_back_any_text_exactly(text: str) -> None:
    tokenizer = _shared_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_keeps_spaces_and_line_ends(tokenizer: Any) -> None:
    for text in (" a  b ", "a\r\n\r\n b", "it 's , n't .", "\t\tx\n", "e\u0301 é ﬁ", "\u00a0"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single_tokens_and_words_keep_their_space() -> None:
    backend = _shared_tokenizer().backend_tokenizer
    pieces = [text for text, _ in backend.pre_tokenizer.pre_tokenize_str("I've 12 cats!\n\n")]
    assert pieces == ["I", "'ve", "Ġ", "1", "2", "Ġcats", "!ĊĊ"]


def test_training_twice_gives_the_same_file(tmp_path: Path, folder: Path) -> None:
    train_tokenizer(training_texts(), 300).save_pretrained(str(tmp_path))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_fingerprint_survives_saving_again_and_padding_and_truncation(
    tmp_path: Path, folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer(["a", "long text"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is not None
    assert tokenizer_fingerprint(tmp_path) == tokenizer_fingerprint(folder)


def test_fingerprint_tells_tokenizers_apart(tmp_path: Path, folder: Path) -> None:
    train_tokenizer(training_texts(), 301).save_pretrained(str(tmp_path))
    assert tokenizer_fingerprint(tmp_path) != tokenizer_fingerprint(folder)


def test_byte_lengths_sum_to_the_bytes_of_the_text(tokenizer: Any) -> None:
    lengths = token_byte_lengths(tokenizer)
    assert lengths.dtype == np.int32 and lengths.shape == (len(tokenizer),)
    assert lengths[[0, 300, 301, 302, 303]].tolist() == [0] * 5
    for text in (TEXT, "日本語 😀", "\x00\x7f"):
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths[[*tokenizer.encode("ab"), 0]].sum() == 2


def test_text_that_quotes_control_tokens_stays_text(folder: Path, tokenizer: Any) -> None:
    text = "<|endoftext|> <|im_start|>user <think>x</think><|im_end|>"
    ids = text_encoder(folder).encode(text, add_special_tokens=False).ids
    assert not set(ids) & {0, 300, 301, 302, 303}
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|im_end|>") == [301]
    plain = text_encoder(folder).encode(TEXT, add_special_tokens=False).ids
    assert plain == tokenizer.encode(TEXT)


@settings(max_examples=50, deadline=None)
@given(
    sources=st.lists(st.text("ab ,\n中文", min_size=20), min_size=5, max_size=10),
    text=st.text(
        st.one_of(st.sampled_from("ab ,\n中文"), st.characters(exclude_categories=["Cs"]))
    ),
)
def test_fast_ids_are_the_same_for_every_tokenizer_that_is_trained(
    tmp_path_factory: pytest.TempPathFactory, sources: list[str], text: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    # As many merges as the texts allow, up to 20: few texts make the oddest tokenizers.
    for size in range(277, 256, -1):
        try:
            train_tokenizer(sources, size).save_pretrained(str(folder))
            break
        except ValueError as error:
            assert "--vocab_size to at most" in str(error)
    exact, fast = text_encoder(folder), fast_encoder(folder)
    for one in (text, *sources, "".join(sources)):
        assert fast.encode(one).tolist() == exact.encode(one, add_special_tokens=False).ids


def test_vocabulary_that_cannot_be_filled_names_its_flag() -> None:
    with pytest.raises(ValueError, match=r"--vocab_size to at most \d+"):
        train_tokenizer(["abc"], 1000)
    with pytest.raises(ValueError, match="--vocab_size 100 is too small"):
        train_tokenizer(["abc"], 100)


def test_folder_without_a_tokenizer_names_its_flag(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--tokenizer: .*train_tokenizer\.py"):
        load_tokenizer(tmp_path / "gone")


@pytest.mark.parametrize(
    "content", ["version https://git-lfs.github.com/spec/v1\n", '{"version": "1.0', "[]", "{}"]
)
def test_a_file_that_is_no_tokenizer_is_named_in_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^--tokenizer: {tmp_path} cannot be opened \(.+make it"):
        load_tokenizer(tmp_path)


def test_chat_template_is_chatml(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": " Hello"},
        {"role": "user", "content": "Bye"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n Hello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_thoughts_are_kept_in_the_last_answer_and_dropped_from_earlier_ones(
    tokenizer: Any,
) -> None:
    thinking: list[dict[str, Any]] = [
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"},
        {"role": "assistant", "content": "Yes", "reasoning_content": "hm"},
    ]
    for answer in thinking:
        last = tokenizer.apply_chat_template([USER, answer], tokenize=False)
        assert last.endswith("assistant\n<think>\nhm\n</think>\n\nYes<|im_end|>\n")
        earlier = tokenizer.apply_chat_template([USER, answer, USER], tokenize=False)
        assert "<|im_start|>assistant\nYes<|im_end|>\n" in earlier


def test_thinking_can_be_asked_for_or_switched_off(tokenizer: Any) -> None:
    ends = {True: "<think>\n", False: "<think>\n\n</think>\n\n"}
    for enabled, end in ends.items():
        text = tokenizer.apply_chat_template(
            [USER], tokenize=False, add_generation_prompt=True, enable_thinking=enabled
        )
        assert text.endswith(f"<|im_start|>assistant\n{end}")


def test_generation_marks_supervise_answers_and_their_end_only(
    tokenizer: Any,
) -> None:
    encoded = tokenizer.apply_chat_template(
        [USER, {"role": "assistant", "content": "Hello"}, USER],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = np.array(encoded["input_ids"])
    supervised = ids[np.array(encoded["assistant_masks"], dtype=bool)]
    assert tokenizer.decode(supervised.tolist()) == "Hello<|im_end|>"


def test_decoding_without_special_tokens_keeps_thoughts_marked(tokenizer: Any) -> None:
    ids = tokenizer.encode("<|im_start|><think>hm</think>Yes<|im_end|><|endoftext|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>hm</think>Yes"


def test_unknown_role_is_refused(tokenizer: Any) -> None:
    with pytest.raises(jinja2.TemplateError, match="system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


_shared: list[Any] = []


def _shared_tokenizer() -> Any:
    """Hypothesis runs one function many times; fixtures cannot be mixed in cheaply."""
    if not _shared:
        _shared.append(train_tokenizer(training_texts(), 300))
    return _shared[0]
