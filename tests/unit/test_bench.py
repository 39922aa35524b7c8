"""python -m mini_llm.bench: that it measures what it says, not how fast anything is."""

import json
from pathlib import Path

import pytest
import torch

from mini_llm.bench import __main__ as bench
from mini_llm.bench.measure import allocations, interleaved, peak_memory
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


def test_peak_memory_is_what_was_held_at_once_and_not_what_was_there_before() -> None:
    x = torch.ones(256, dtype=torch.uint8)

    def call() -> None:
        y = torch.cat((x, x))  # 512 bytes, and freed with the next line
        y = torch.cat((y, y))
        del y

    assert allocations(call) == [512, 1024, -512, -1024]
    assert peak_memory(call) == 1536


ATTENTION_FLAGS = ["attention", "--seq_len", "64", "--documents", "3", "--repeats", "2"]


@pytest.fixture
def one_preset_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mini_llm.bench.attention.list_models", lambda: ["mini_llama3"])
    monkeypatch.setattr("mini_llm.bench.attention.DTYPES", {"fp32": torch.float32})


@pytest.mark.usefixtures("one_preset_in_fp32")
def test_attention_figures_are_of_equal_results_at_three_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.main([*ATTENTION_FLAGS, "--output", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    printed = capsys.readouterr().out
    for name in ("mini_llama3 attention fp32", "mini_llama3 layer fp32", "mini_llama3_tiny fp32"):
        assert name in printed
        assert min(figures[name].values()) > 0
    attention = figures["mini_llama3 attention fp32"]
    query, key_and_value = 64 * 12 * 64 * 4, 2 * 64 * 4 * 64 * 4  # bytes; so much for gradients
    assert attention["packed_peak_mib"] * 2**20 > query + key_and_value
    assert 1 / 3 <= figures["blocks_of_square"] < 1


@pytest.mark.usefixtures("one_preset_in_fp32")
def test_a_mask_that_leaks_between_documents_is_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    causal = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    monkeypatch.setattr("mini_llm.bench.attention.block_diagonal_mask", lambda row: causal)
    with pytest.raises(RuntimeError, match="mini_llama3 attention fp32: the two ways' results"):
        bench.main(ATTENTION_FLAGS)


def test_more_documents_than_tokens_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["attention", "--seq_len", "4", "--documents", "5"])
    assert capsys.readouterr().err == "--documents: 5 is not between 1 and --seq_len 4\n"


def test_generation_figures_compare_the_generator_with_generate_of_both_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "mini_llama3_tiny", "--batch", "2", "--prompt_tokens", "8"]
    flags += ["--new_tokens", "4", "--repeats", "1", "--output", str(tmp_path / "figures.json")]
    bench.main(["generation", *flags])
    figures = json.loads((tmp_path / "figures.json").read_text())["mini_llama3_tiny batch 2"]
    ratio = figures["generator_tokens_per_second"] / figures["stock_tokens_per_second"]
    assert figures["stock_over_generator"] == pytest.approx(ratio)
    assert "mini_llama3_tiny, batch 2: generate " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["generation", *flags[:4], "--prompt_tokens", "2048", "--new_tokens", "1"])
    assert "--prompt_tokens 2048 and --new_tokens 1 are more" in capsys.readouterr().err


def test_tokens_that_differ_are_told_from_a_tie() -> None:
    from mini_llm import build_model
    from mini_llm.bench.generation import _parts_at_a_tie

    model = build_model("mini_llama3_tiny", vocab_size=64).eval()
    with torch.no_grad():
        first, *_, last = model(torch.tensor([[1, 2]])).logits[0, -1].argsort().tolist()
        assert not _parts_at_a_tie(model, [1, 2], [first, 5], [last, 5])
        model.lm_head.weight[first] = model.lm_head.weight[last]
    assert _parts_at_a_tie(model, [1, 2], [first, 5], [last, 6])
