"""The tokenizer that comes with the project, and the fast encoder on it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mini_llm.data import tokenizer as tokenizer_module
from mini_llm.data.packing import pack_documents
from mini_llm.data.tokenizer import (
    CHAT_TEMPLATE,
    DEFAULT_TOKENIZER,
    LONGEST_SPACE_RUN,
    PRETOKENIZER_PATTERN,
    SPECIAL_TOKENS,
    fast_encoder,
    load_tokenizer,
    text_encoder,
    token_byte_lengths,
    tokenizer_fingerprint,
)

# The pattern of Qwen2's tokenizer.json, letter for letter: what llama.cpp runs as "qwen2".
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL_IDS = {0, 32000, 32001, 32002, 32003}
USER = {"role": "user", "content": "你好"}

# What breaks tokenizers: white space of all kinds, contractions and letters that fold to their "s",
# the text of control tokens, scripts without spaces, marks, emoji.
SPACES = (" ", "   ", "\t", "\n", "\r\n", "\u3000", "\x85", "\u2028", "\xa0")
CONTRACTIONS = ("'s", "'S", "'ſ", "'ll", "’re", "I'M")
NUMBERS = ("12", "٣", "²", "ⅷ")
CHINESE = ("中文", "。", "，数据", "模型的")
OTHERS = (
    "e\u0301",
    "👩\u200d👧",
    "ﬁ",
    "İ",
    "ß",
    "한국어",
    "ไทย",
    "—",
    "----",
    "\x00",
    "\x7f",
    "|>",
)
PIECES = st.sampled_from(SPECIAL_TOKENS + SPACES + CONTRACTIONS + NUMBERS + CHINESE + OTHERS)
ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(
        st.one_of(PIECES, st.text(st.characters(exclude_categories=["Cs"]), max_size=4)),
        max_size=30,
    ).map("".join),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEFAULT_TOKENIZER)


def test_it_has_32004_entries_and_the_ids_of_the_design(tokenizer: Any) -> None:
    assert len(tokenizer) == 32004
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 32000, 32001, 32002, 32003]
    assert sorted(tokenizer.get_vocab().values()) == list(range(32004))
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.bos_token_id is None


def test_it_opens_with_stock_auto_tokenizer_and_adds_nothing(tokenizer: Any) -> None:
    assert load_tokenizer(DEFAULT_TOKENIZER).get_vocab() == tokenizer.get_vocab()
    assert not set(tokenizer("plain text")["input_ids"]) & CONTROL_IDS


def test_its_files_are_those_that_the_training_tool_writes(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(tmp_path) == tokenizer_fingerprint(DEFAULT_TOKENIZER)
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert {path.name for path in DEFAULT_TOKENIZER.iterdir()} == names | {"README.md"}
    assert (DEFAULT_TOKENIZER / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE


def test_its_pattern_is_the_one_that_llama_cpp_and_vllm_know() -> None:
    content = json.loads((DEFAULT_TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    split, byte_level = content["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": QWEN2_PATTERN} == {"Regex": PRETOKENIZER_PATTERN}
    assert split["behavior"] == "Isolated" and split["invert"] is False
    assert byte_level["type"] == "ByteLevel" and byte_level["use_regex"] is False
    assert byte_level["add_prefix_space"] is False
    assert content["normalizer"] is None and content["model"]["type"] == "BPE"


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_decode_gives_back_any_text_and_the_fast_ids_are_the_same(text: str) -> None:
    exact, fast, whole = _encoders()
    ids = exact.encode(text, add_special_tokens=False).ids
    assert fast.encode(text).tolist() == ids
    assert not set(ids) & CONTROL_IDS
    assert whole.decode(ids) == text
    assert whole.decode(whole.encode(text)) == text


def test_the_fast_ids_are_the_same_for_every_assigned_character() -> None:
    exact, fast, _ = _encoders()
    # Where Unicode has characters: the planes 0 to 3 and the tags, not the surrogates; of the
    # rest, which no table names, a few.
    codes = [*range(0xD800), *range(0xE000, 0x40000), *range(0x40000, 0x110000, 64)]
    characters = [chr(code) for code in [*codes, *range(0xE0000, 0xE0200)]]
    # A letter or not, white space or not, and how it folds, all show in what stands around it.
    for start in range(0, len(characters), 4096):
        text = "".join(f"a{c} {c}\n'{c}1" for c in characters[start : start + 4096])
        assert fast.encode(text).tolist() == exact.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("space", [" ", "\n", " \n", "\u3000", "\r\n"])
@pytest.mark.parametrize("length", [1, 7, 500, LONGEST_SPACE_RUN, LONGEST_SPACE_RUN + 1])
def test_long_runs_of_white_space_have_the_same_ids(space: str, length: int) -> None:
    exact, fast, _ = _encoders()
    before = fast.slow_texts
    text = f"x{(space * length)[:length]}y"
    assert fast.encode(text).tolist() == exact.encode(text, add_special_tokens=False).ids
    assert fast.slow_texts - before == (length > LONGEST_SPACE_RUN)


def test_a_million_equal_characters_are_encoded() -> None:
    _, fast, whole = _encoders()
    before = fast.slow_texts
    for character in (" ", "a", "中", "!", "1", "\n"):
        ids = fast.encode(character * 1_000_000)
        lengths = token_byte_lengths(whole)[ids]
        assert lengths.sum() == len(character.encode()) * 1_000_000
    assert fast.slow_texts - before == 2  # the two kinds of white space


def test_fast_ids_are_uint32_and_half_a_surrogate_pair_is_refused() -> None:
    _, fast, _ = _encoders()
    assert fast.encode("").tolist() == [] and fast.encode("").dtype == np.uint32
    with pytest.raises(UnicodeEncodeError):
        fast.encode("a\ud83d")


def changed(content: dict[str, Any], change: str) -> None:
    """Make the tokenizer one whose ids tiktoken would not give."""
    model = content["model"]
    if change == "normalizer":
        content["normalizer"] = {"type": "NFC"}
    elif change == "pre-tokenizer":
        content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True}
    elif change == "ignore_merges":
        model["ignore_merges"] = True
    elif change == "order of the ids":
        model["merges"][500], model["merges"][900] = model["merges"][900], model["merges"][500]
    elif change == "bytes do not come before":
        vocab = model["vocab"]
        last = max(vocab, key=vocab.get)
        vocab["A"], vocab[last] = vocab[last], vocab["A"]
        model["merges"].insert(0, model["merges"].pop())
    else:  # the last token is made of two that never meet, because "Ġt" is merged before
        vocab, merges = model["vocab"], model["merges"]
        del vocab["".join(merges.pop())]
        word = next(t for t in vocab if t.startswith("t") and "Ġ" + t not in vocab and len(t) > 3)
        merges.append(["Ġ", word])
        vocab["Ġ" + word] = 31999


@pytest.mark.parametrize(
    "change",
    [
        "normalizer",
        "pre-tokenizer",
        "ignore_merges",
        "order of the ids",
        "bytes do not come before",
        "does not encode to itself",
    ],
)
def test_a_tokenizer_that_tiktoken_would_run_differently_is_refused(
    tmp_path: Path, change: str
) -> None:
    content = json.loads((DEFAULT_TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    changed(content, change)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=f"cannot be run by tiktoken .*{change}.*text_encoder"):
        fast_encoder(tmp_path)


def test_chat_template_renders_all_roles_and_thoughts(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "简短。"},
        USER,
        {"role": "assistant", "content": "<think>\n想\n</think>\n\n你好！"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\n简短。<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n想\n</think>\n\n你好！<|im_end|>\n"
    )
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert [i for i in ids if i in CONTROL_IDS] == [
        *(32000, 32001, 32000, 32001),
        *(32000, 32002, 32003, 32001),
    ]
    prompt = tokenizer.apply_chat_template(
        [*messages, USER], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert prompt.endswith(
        "<|im_start|>assistant\n你好！<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_generation_marks_cover_the_answer_and_its_end(tokenizer: Any) -> None:
    encoded = tokenizer.apply_chat_template(
        [USER, {"role": "assistant", "content": "再见"}],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    mask = np.array(encoded["assistant_masks"], dtype=bool)
    assert tokenizer.decode(np.array(encoded["input_ids"])[mask].tolist()) == "再见<|im_end|>"


def test_its_vocabulary_is_words_not_rules_paths_or_markup(tokenizer: Any) -> None:
    lengths = token_byte_lengths(tokenizer)
    texts = [tokenizer.decode([i]) for i in range(1, 32000)]
    # Lines of dashes, dots or stars; file paths; tags: what a web page has and a text has not.
    junk = re.compile(r"([^\w\s])\1{3,}|/\w+/|</?\w+>|https?:|www\.|\.html")
    assert [text for text in texts if junk.search(text)] == []
    han = [text for text in texts if re.search("[\u4e00-\u9fff]", text)]
    english = [text for text in texts if re.fullmatch(" ?[A-Za-z]+", text)]
    assert len(han) > 12_000 and len(english) > 8_000
    assert lengths.max() <= 48


@pytest.mark.parametrize("language", ["Chinese", "English"])
def test_tokenising_and_packing_gives_the_rows_that_encode_batch_gives(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # one core
    exact, fast, _ = _encoders()
    documents = random_documents(
        tokenizer, "[\u4e00-\u9fff]+" if language == "Chinese" else " [a-z]+"
    )

    def packed(ids: list[np.ndarray]) -> np.ndarray:
        lengths = np.array([len(one) for one in ids], np.int64)
        return pack_documents(np.concatenate(ids).astype(np.uint16), lengths, 2048).input_ids

    def slowly() -> np.ndarray:
        found = exact.encode_batch(documents, add_special_tokens=False)
        return packed([np.array(encoding.ids, np.uint32) for encoding in found])

    def quickly() -> np.ndarray:
        return packed([fast.encode(document) for document in documents])

    assert np.array_equal(slowly(), quickly())  # how fast: python -m mini_llm.bench data


def random_documents(tokenizer: Any, pattern: str) -> list[str]:
    """Return 300 documents of 1,000 tokens that match, in clauses as long as real ones."""
    rng = random.Random(0)
    texts = [tokenizer.decode([i]) for i in range(257, 32000)]
    words = [text for text in texts if re.fullmatch(pattern, text)]
    return [
        "".join(
            word + ("，" if n % 6 == 5 else "") for n, word in enumerate(rng.choices(words, k=1000))
        )
        for _ in range(300)
    ]


def test_chinese_text_takes_fewer_tokens_than_characters() -> None:
    # A quarter more characters than tokens, on a sentence that was not in the training text.
    text = "春天来了，同学们在老师的带领下参观了科学博物馆，了解了许多关于地球和宇宙的知识。"
    assert len(text) / len(_encoders()[1].encode(text)) > 1.25


def test_its_readme_names_its_fingerprint_and_the_retraining(tokenizer: Any) -> None:
    readme = (DEFAULT_TOKENIZER / "README.md").read_text(encoding="utf-8")
    assert tokenizer_fingerprint(DEFAULT_TOKENIZER) in readme
    assert "FineWeb" in readme and "data_tools/train_tokenizer.py" in readme


def test_default_tokenizer_lies_inside_the_package() -> None:
    package = Path(tokenizer_module.__file__).resolve().parents[1]
    assert package / "tokenizer" == DEFAULT_TOKENIZER


_opened: list[Any] = []


def _encoders() -> tuple[Any, Any, Any]:
    """The exact, the fast and the stock tokenizer; hypothesis runs one function many times."""
    if not _opened:
        _opened.append((text_encoder(DEFAULT_TOKENIZER), fast_encoder(DEFAULT_TOKENIZER)))
        _opened.append(AutoTokenizer.from_pretrained(DEFAULT_TOKENIZER))
    return *_opened[0], _opened[1]
