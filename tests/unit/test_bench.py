"""python -m mini_llm.bench: that it measures what it says, not how fast anything is."""

import json
from pathlib import Path

import pytest

from mini_llm.bench import __main__ as bench
from mini_llm.bench.measure import interleaved
from tests.unit.prepare_fixtures import write_shards


def test_variants_take_turns_after_one_call_each_that_is_not_timed() -> None:
    calls: list[str] = []
    variants = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    seconds = interleaved(variants, repeats=3)
    assert "".join(calls) == "ab" + "ababab"
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_data_figures_are_printed_and_written_with_what_they_were_taken_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mini_llm.bench.data.STREAM_TOKENS", 1 << 16)
    write_shards(tmp_path / "in", 2)
    flags = ["--seq_len", "64", "--repeats", "1", "--output", str(tmp_path / "figures.json")]
    bench.main(["data", "--input", str(tmp_path / "in"), *flags])
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert "120 documents" in printed and "M tokens/s" in printed
    assert figures["tokens"] > 0 and 0 < figures["utilisation"] <= 1
    ours = figures["tokenise_and_pack_tokens_per_second"]
    theirs = figures["encode_batch_and_pack_tokens_per_second"]
    assert figures["ratio"] == pytest.approx(ours / theirs)
    assert {"machine", "threads", "tokenizers", "tiktoken", "datasets"} <= figures.keys()


def test_missing_input_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["data", "--input", "no/such/folder"])
    assert capsys.readouterr().err == "--input: no/such/folder does not exist\n"
