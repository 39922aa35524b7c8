"""The tokenizer training tool: what it keeps, what it holds out, what it reports."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_tools import train_tokenizer
from data_tools.train_tokenizer import REPORT_NAME, Sample
from mini_llm.data.tokenizer import text_encoder

VOCAB_SIZE = 300
WORDS = ("alpha", "beta", "gamma", "delta", "数据", "模型", "训练", "文本", "the", "of")
Texts = list[tuple[str, str]]


def texts_of(count: int, sources: tuple[str, ...] = ("web", "books")) -> Texts:
    """Return distinct documents (text, source)."""
    rng = random.Random(0)
    return [
        (
            f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(5, 40))),
            sources[number % len(sources)],
        )
        for number in range(count)
    ]


def write_parquet(path: Path, documents: Texts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts, sources = zip(*documents, strict=True)
    table = pa.table({"text": texts, "score": [1.0] * len(texts), "source": sources})
    pq.write_table(table, path)


def train(inputs: list[Path], output: Path, **options: object) -> dict[str, Any]:
    """Run the tool with small defaults; return its report."""
    command = ["--input", *map(str, inputs), "--output_dir", str(output)]
    for name, value in {"vocab_size": VOCAB_SIZE, **options}.items():
        values = value if isinstance(value, list) else [value]
        command += [f"--{name}", *map(str, values)]
    train_tokenizer.run(train_tokenizer.parse_arguments(command))
    report: dict[str, Any] = json.loads((output / REPORT_NAME).read_text(encoding="utf-8"))
    return report


def is_held_out(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=16, person=b"train_tokenizer").digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 50), st.sampled_from("abc")), max_size=60),
    limit=st.integers(150, 600),
    seed=st.integers(0, 2**32),
)
def test_a_sample_never_exceeds_its_limit_and_keeps_every_source(
    lengths: list[tuple[int, str]], limit: int, seed: int
) -> None:
    rng = random.Random(seed)
    sample, added = Sample(limit), []
    for length, source in lengths:
        added.append((rng.getrandbits(64), source, "x" * length))
        sample.add("x" * length, source, added[-1][0])
        assert sample.characters <= limit
    kept = sample.sources()
    assert sum(len(text) for texts in kept.values() for text in texts) == sample.characters
    assert kept.keys() == {source for _, source, _ in added}
    for source, texts in kept.items():
        assert texts[0] == min(document for document in added if document[1] == source)[2]
    if sum(length for length, _ in lengths) <= limit:
        assert list(sample.texts()) == [text for _, _, text in sorted(added)]


def test_a_sample_keeps_the_same_share_of_every_source_wherever_it_stands() -> None:
    sample, rng = Sample(200_000), random.Random(1)
    sizes = {"first": 60_000, "rare": 2_000, "last": 38_000}
    for source, count in sizes.items():
        for _ in range(count):
            sample.add("0123456789", source, rng.getrandbits(64))
    for source, texts in sample.sources().items():
        share = len(texts) / sizes[source]
        # 200,000 of 1,000,000 characters: within 4 standard deviations.
        assert abs(share - 0.2) < 4 * (0.2 * 0.8 / sizes[source]) ** 0.5
    assert sample.characters == 200_000


def test_the_sampling_limit_bounds_what_is_kept_and_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = texts_of(400)
    write_parquet(tmp_path / "in" / "a.parquet", documents)
    limits = {"max_characters": 20_000, "held_out_fraction": 0.1}
    report = train([tmp_path / "in"], tmp_path / "out", **limits)
    everything = sum(len(text) for text, _ in documents)
    assert report["read"]["all"] == {"documents": 400, "characters": everything}
    kept = report["training"]["all"]["characters"]
    assert everything > 30_000 and 17_800 < kept <= 18_000
    assert report["training"].keys() == {"web", "books", "all"}
    assert 1_800 < report["held_out"]["all"]["text"]["characters"] <= 2_000
    output = capsys.readouterr().out
    assert f"read 400 documents, {everything:,} characters; kept at most 20,000" in output


def test_the_same_documents_in_other_files_and_order_give_the_same_tokenizer(
    tmp_path: Path,
) -> None:
    documents = texts_of(300)
    write_parquet(tmp_path / "one" / "a.parquet", documents)
    shuffled = random.Random(3).sample(documents, len(documents))
    write_parquet(tmp_path / "two" / "a.parquet", shuffled[:70])
    write_parquet(tmp_path / "two" / "b.parquet", shuffled[70:])
    for folder in ("one", "two"):
        limits = {"max_characters": 15_000, "held_out_fraction": 0.1}
        train([tmp_path / folder], tmp_path / f"out_{folder}", **limits)
    for name in ("tokenizer.json", REPORT_NAME):
        one, two = ((tmp_path / f"out_{f}" / name).read_bytes() for f in ("one", "two"))
        assert one == two


def test_held_out_texts_are_chosen_by_their_hash_and_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = texts_of(200)
    write_parquet(tmp_path / "in" / "a.parquet", documents + documents[:50])  # with copies
    trained: list[str] = []
    original = train_tokenizer.train_tokenizer

    def recorded(texts: Any, *options: int) -> Any:
        trained.extend(texts)
        return original(iter(trained), *options)

    monkeypatch.setattr(train_tokenizer, "train_tokenizer", recorded)
    report = train([tmp_path / "in"], tmp_path / "out", held_out_fraction=0.2)
    held_out = [text for text, _ in documents + documents[:50] if is_held_out(text, 0.2)]
    assert 20 < len(held_out) < 80
    assert report["held_out"]["all"]["text"]["documents"] == len(held_out)
    assert sorted([*trained, *held_out]) == sorted(t for t, _ in documents + documents[:50])
    assert not set(trained) & set(held_out)


def test_reported_characters_and_bytes_per_token_are_those_of_the_saved_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = texts_of(300, ("web", "books", "rare"))
    write_parquet(tmp_path / "in" / "a.parquet", documents)
    report = train([tmp_path / "in"], tmp_path / "out", held_out_fraction=0.2)["held_out"]
    encoder = text_encoder(tmp_path / "out")
    output = capsys.readouterr().out
    for source in ("web", "books", "rare", "all"):
        texts = [
            text
            for text, of in documents
            if of == source or source == "all"
            if is_held_out(text, 0.2)
        ]
        tokens = sum(len(encoder.encode(text, add_special_tokens=False).ids) for text in texts)
        characters = sum(map(len, texts))
        num_bytes = sum(len(text.encode()) for text in texts)
        assert report[source] == {
            "text": {"documents": len(texts), "characters": characters, "bytes": num_bytes},
            "tokenizers": {
                "this": {
                    "tokens": tokens,
                    "characters_per_token": pytest.approx(characters / tokens, abs=1e-4),
                    "bytes_per_token": pytest.approx(num_bytes / tokens, abs=1e-4),
                }
            },
        }
        assert f"{characters / tokens:.3f} ({num_bytes / tokens:.3f})" in output


def test_other_tokenizers_are_reported_on_the_same_text(tmp_path: Path) -> None:
    documents = texts_of(200)
    write_parquet(tmp_path / "in" / "a.parquet", documents)
    train([tmp_path / "in"], tmp_path / "smaller", vocab_size=260)
    ranks = {bytes([byte]): byte for byte in range(256)}
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    (tmp_path / "bytes.tiktoken").write_bytes(b"\n".join(lines))
    smaller = tmp_path / "smaller"
    report = train(
        [tmp_path / "in"],
        tmp_path / "out",
        held_out_fraction=0.2,
        compare=[smaller, tmp_path / "bytes.tiktoken"],
    )
    by_name = report["held_out"]["all"]["tokenizers"]
    text = report["held_out"]["all"]["text"]
    assert by_name.keys() == {"this", "smaller", "bytes.tiktoken"}
    assert by_name["bytes.tiktoken"]["tokens"] == text["bytes"]
    encoder = Tokenizer.from_file(str(smaller / "tokenizer.json"))
    held_out = [text for text, _ in documents if is_held_out(text, 0.2)]
    expected = sum(len(encoder.encode(text, add_special_tokens=False).ids) for text in held_out)
    assert by_name["smaller"]["tokens"] == expected > by_name["this"]["tokens"]


def test_rejected_rows_are_counted_by_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", [*texts_of(100), ("", "web"), ("  ", "web")])
    report = train([tmp_path / "in"], tmp_path / "out")
    assert report["rejected"] == {"empty": 2}
    assert report["read"]["all"]["documents"] == 100
    assert "rejected: 2 empty" in capsys.readouterr().out


def test_a_source_without_held_out_text_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = texts_of(100)
    rare = next(f"{n} rare" for n in range(100) if not is_held_out(f"{n} rare", 0.2))
    write_parquet(tmp_path / "in" / "a.parquet", [*documents, (rare, "rare")])
    report = train([tmp_path / "in"], tmp_path / "out", held_out_fraction=0.2)
    assert report["held_out"].keys() == {"web", "books", "all"}
    assert "no held-out text of rare: raise --held_out_fraction" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 100}, "--vocab_size 100 is too small"),
        ({"max_characters": 0}, "--max_characters 0: give a positive number"),
        ({"held_out_fraction": 1}, "--held_out_fraction 1.0 is no share"),
        ({"compare": "gone.tiktoken"}, "--compare: gone.tiktoken is no tokenizer; give"),
    ],
)
def test_a_wrong_value_is_named_before_anything_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setattr(train_tokenizer, "find_text_files", lambda paths: pytest.fail("read"))
    with pytest.raises((ValueError, OSError), match=message):
        train([tmp_path], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"), [("x.json", b"{}"), ("x.tiktoken", b"a b c"), ("y.tiktoken", b"!!! 0")]
)
def test_a_broken_tokenizer_to_compare_with_is_named(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    write_parquet(tmp_path / "in" / "a.parquet", texts_of(10))
    with pytest.raises(ValueError, match=rf"--compare: .*{name} is no tokenizer that"):
        train([tmp_path / "in"], tmp_path / "out", compare=tmp_path / name)


def test_a_limit_that_cannot_hold_one_document_of_each_source_names_its_flag(
    tmp_path: Path,
) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", [("x" * 60, "a"), ("y" * 60, "b")])
    with pytest.raises(ValueError, match="--max_characters is too small: .* 2 sources has 120"):
        train([tmp_path / "in"], tmp_path / "out", max_characters=100, held_out_fraction=0)


def test_the_command_fails_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", str(tmp_path / "gone"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["train_tokenizer.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        train_tokenizer.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"--input: {tmp_path / 'gone'} does not exist\n"


def test_the_limit_is_stated_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_tokenizer.parse_arguments(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "sampling limit: at most so many characters are kept" in shown
    assert "takes about 250 bytes of memory for a character of Chinese" in shown
