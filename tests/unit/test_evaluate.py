"""`launch.sh evaluate`: its figures against plain loops, its tables, its mistakes."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from mini_llm import build_model, load_model
from mini_llm.command_line import UsageError
from mini_llm.data import load_tokenizer, open_validation, token_byte_lengths
from mini_llm.evaluate import __main__ as command
from mini_llm.evaluate import harness, questions
from mini_llm.evaluate.arguments import parse_flags
from mini_llm.evaluate.checkpoint import find_checkpoint
from mini_llm.evaluate.held_out import buckets_of, evaluate_held_out
from mini_llm.evaluate.results import as_text, read_results, tasks_table
from mini_llm.evaluate.texts import read_texts, rows_of
from mini_llm.hub.export import base_generation_config, chat_generation_config
from mini_llm.hub.model_card import from_hub, write_card
from mini_llm.inference.ends import is_chat_model
from mini_llm.plots.report import write_report
from mini_llm.training.arguments import PretrainArguments
from mini_llm.training.evaluation import evaluate
from mini_llm.training.run_folder import write_config
from mini_llm.training.sizes import count_parameters
from tests.conftest import TINY_MODELS
from tests.launching import REPOSITORY
from tests.unit.prepare_fixtures import (
    SEQ_LEN,
    decoded,
    example_texts,
    make_tokenizer,
    prepare,
    write_shard,
)

CPU = torch.device("cpu")
LLAMA = "mini_llama3_tiny"
TRICKY = [
    "plain words",
    "混排 mixed 文本: 😀🈶 以及罕用字𠮷。",
    "quotes <|endoftext|> and <|im_start|> and [CLS]",
    "  Spaces\n\n and É accents  ",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tokenizer and packed rows of it, some of them held out."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = make_tokenizer(folder / "tokenizer")
    write_shard(folder / "text" / "000000.parquet", example_texts(200))
    prepare(folder / "text", tokenizer, folder / "packed")
    sources = {"web": {"path": str(folder / "packed"), "weight": 1}}
    return SimpleNamespace(tokenizer=tokenizer, packed=folder / "packed", sources=sources)


@pytest.fixture(scope="module")
def checkpoints(data: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each architecture, as a stock checkpoint."""
    folders = {}
    tokenizer: Any = load_tokenizer(data.tokenizer)
    for name, overrides in TINY_MODELS.items():
        torch.manual_seed(0)
        model: Any = build_model(name, vocab_size=len(tokenizer), **overrides)
        model.generation_config = base_generation_config(tokenizer)
        folders[name] = tmp_path_factory.mktemp(name) / "final"
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture
def run(data: SimpleNamespace, checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A finished run folder whose last evaluation is that of training/evaluation.py."""
    folder = tmp_path / "run"
    shutil.copytree(checkpoints[LLAMA], folder / "final")
    args = PretrainArguments(
        output_dir=str(folder),
        model=LLAMA,
        tokenizer=str(data.tokenizer),
        data=data.sources,
        seq_len=SEQ_LEN,
        max_eval_rows=5,
    )
    write_config(folder, args)
    facts = {
        "recipe": "pretrain",
        "from_hub": from_hub(args),
        "parameters": dataclasses.asdict(count_parameters(load_model(folder / "final"))),
        **{"world_size": 1, "distributed_type": "NO", "zero_stage": None, "device": "cpu"},
        **{"expert_parallel_size": 1, "versions": {"torch": "1", "transformers": "2"}},
    }
    (folder / "run.json").write_text(json.dumps(facts))
    logged = logged_by_training(folder / "final", data, max_rows=5)
    lines = [{"step": 1, "train/loss": 9.0}, {"step": 20, "train/loss": 8.0, **logged}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def held_out_of(data: SimpleNamespace, max_rows: int | None = None) -> Any:
    return open_validation(data.sources, seq_len=SEQ_LEN, max_rows=max_rows)


def logged_by_training(
    folder: Path, data: SimpleNamespace, max_rows: int | None = None
) -> dict[str, float]:
    """What a recipe would log for the checkpoint."""
    return evaluate(
        Accelerator(cpu=True),
        load_model(folder),
        held_out_of(data, max_rows),
        batch_size=3,
        token_bytes=token_byte_lengths(load_tokenizer(data.tokenizer)),
    )


# ------------------------------------------------------------------ held-out text


@pytest.mark.parametrize("name", TINY_MODELS)
def test_figures_are_those_that_training_logs_with_our_class_and_with_the_stock_one(
    name: str, data: SimpleNamespace, checkpoints: dict[str, Path]
) -> None:
    logged = logged_by_training(checkpoints[name], data)
    token_bytes = token_byte_lengths(load_tokenizer(data.tokenizer))
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        found = evaluate_held_out(
            load(checkpoints[name]).eval(),
            held_out_of(data),
            batch_size=4,
            device=CPU,
            token_bytes=token_bytes,
        )["web"]
        assert found["loss"] == pytest.approx(logged["eval/web/loss"], rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(logged["eval/web/bits_per_byte"], rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(logged["eval/web/loss"]), rel=1e-4)


def test_buckets_of_length_and_of_position_each_hold_every_predicted_token_once(
    data: SimpleNamespace, checkpoints: dict[str, Path]
) -> None:
    rows = held_out_of(data)
    token_bytes = token_byte_lengths(load_tokenizer(data.tokenizer))
    model = load_model(checkpoints[LLAMA]).eval()
    found = evaluate_held_out(model, rows, batch_size=4, device=CPU, token_bytes=token_bytes)["web"]
    lengths = np.concatenate([row["doc_lens"] for row in rows["web"].rows])
    for key in ("by_length", "by_position"):
        assert sum(bucket["tokens"] for bucket in found[key]) == found["tokens"]
        assert sum(bucket["bytes"] for bucket in found[key]) == found["bytes"]
        nats = sum(bucket["loss"] * bucket["tokens"] for bucket in found[key])
        assert nats == pytest.approx(found["loss"] * found["tokens"])
    assert found["tokens"] == (lengths - 1).sum()
    for bucket in found["by_length"]:
        inside = lengths[(bucket["from"] <= lengths) & (lengths <= bucket["to"])]
        assert (bucket["documents"], bucket["tokens"]) == (len(inside), (inside - 1).sum())
    for bucket in found["by_position"]:
        places = np.concatenate([np.arange(1, length) for length in lengths])
        inside = places[(bucket["from"] <= places) & (places <= bucket["to"])]
        assert bucket["tokens"] == len(inside)


def test_a_bucket_goes_from_one_power_of_two_to_the_next() -> None:
    assert buckets_of(np.array([1, 2, 3, 4, 7, 8, 255, 256])).tolist() == [0, 1, 1, 2, 2, 3, 7, 8]


def other_tokenizers() -> Iterator[Any]:
    """Tokenizers that are none of this project's: other algorithms, normalisers, BOS tokens."""
    from tokenizers.processors import TemplateProcessing

    texts = [*TRICKY, *example_texts(200)]
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    unigram.train_from_iterator(
        texts,
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )
    unigram.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    yield PreTrainedTokenizerFast(
        tokenizer_object=unigram, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=400, special_tokens=["[UNK]", "[CLS]"], show_progress=False
        ),
    )
    yield PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]", cls_token="[CLS]")


def test_the_bytes_of_all_tokens_are_those_of_the_text_whatever_the_tokenizer(
    data: SimpleNamespace,
) -> None:
    for tokenizer in (load_tokenizer(data.tokenizer), *other_tokenizers()):
        for text in TRICKY:
            (row,) = rows_of(text, tokenizer, seq_len=1000, source="x")
            assert row["token_bytes"].sum() == len(text.encode())
            assert (row["token_bytes"] >= 0).all()
            begins = tokenizer.bos_token_id is not None
            assert (row["input_ids"][0] == tokenizer.bos_token_id) == begins
            if tokenizer.eos_token_id is not None:
                assert row["input_ids"][-1] == tokenizer.eos_token_id
                assert row["token_bytes"][-1] == 0


def test_a_text_that_quotes_a_control_token_is_text(data: SimpleNamespace) -> None:
    tokenizer: Any = load_tokenizer(data.tokenizer)
    (row,) = rows_of(TRICKY[2], tokenizer, seq_len=1000, source="x")
    special = {tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_start|>")}
    assert not special & set(row["input_ids"][:-1].tolist())


def test_long_documents_are_cut_to_rows_and_lose_no_token(data: SimpleNamespace) -> None:
    tokenizer = load_tokenizer(data.tokenizer)
    text = " ".join(example_texts(5))
    (whole,) = rows_of(text, tokenizer, seq_len=10_000, source="x")
    pieces = rows_of(text, tokenizer, seq_len=16, source="x")
    assert [len(piece["input_ids"]) for piece in pieces[:-1]] == [16] * (len(pieces) - 1)
    together = np.concatenate([piece["input_ids"] for piece in pieces])
    assert together.tolist() == whole["input_ids"][: len(together)].tolist()
    assert len(whole["input_ids"]) - len(together) <= 1  # a last piece of one token predicts none


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2, an architecture that this project does not have, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("foreign") / "gpt2"
    tokenizer: Any = next(other_tokenizers())
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=96, n_embd=32, n_layer=2, n_head=2, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_bits_per_byte_of_a_foreign_model_are_those_of_a_plain_loop(
    foreign: Path, tmp_path: Path
) -> None:
    file = tmp_path / "some.jsonl"
    lines = [json.dumps({"text": text}) for text in [*TRICKY, *example_texts(6)]]
    file.write_text("\n".join([*lines, "not json", json.dumps({"no": 1})]))
    out = tmp_path / "out"
    flags = [str(foreign), "--text", str(file), "--skip", "tasks", "--device", "cpu"]
    assert command.main([*flags, "--output_dir", str(out), "--max_eval_rows", "0"]) == 0
    found = json.loads((out / "results.json").read_text())["held_out"]["some.jsonl"]

    model: Any = AutoModelForCausalLM.from_pretrained(foreign).eval()
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(foreign)
    nats, num_bytes = 0.0, 0
    for text in [*TRICKY, *example_texts(6)]:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"] + [tokenizer.eos_token_id]
        assert ids[0] == tokenizer.bos_token_id and len(ids) <= 96
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats -= sum(float(log_p[i, ids[i + 1]]) for i in range(len(ids) - 1))
        num_bytes += len(text.encode())
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert (out / "perplexity_by_length.png").is_file()


def test_held_out_documents_given_as_text_have_the_figures_of_the_packed_rows(
    data: SimpleNamespace, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(data.tokenizer)
    texts = decoded(data.packed, data.tokenizer, "validation")
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "web.jsonl").write_text("".join(lines))
    read = read_texts([tmp_path / "web.jsonl"], tokenizer, seq_len=SEQ_LEN, max_rows=None)
    figures = [
        evaluate_held_out(
            load_model(checkpoints[LLAMA]).eval(),
            rows,
            **{"batch_size": 4, "device": CPU, "token_bytes": token_byte_lengths(tokenizer)},
        )[name]
        for name, rows in {"web": held_out_of(data), "web.jsonl": read.held_out}.items()
    ]
    for figure in ("loss", "bits_per_byte", "tokens", "bytes"):
        assert figures[0][figure] == pytest.approx(figures[1][figure], rel=1e-5)


def test_text_files_of_every_kind_give_the_same_rows_and_say_what_they_left_out(
    data: SimpleNamespace, tmp_path: Path
) -> None:
    texts = example_texts(3)
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in [*texts, " "]) + '\n{"text": "\\ud800"}\n'
    )
    write_shard(tmp_path / "b.parquet", [*texts, None])
    (tmp_path / "c.txt").write_text(texts[0], encoding="utf-8")
    files = [tmp_path / name for name in ("a.jsonl", "b.parquet", "c.txt")]
    found = read_texts(files, load_tokenizer(data.tokenizer), seq_len=999, max_rows=None)
    ids = {n: [r["input_ids"].tolist() for r in h.rows] for n, h in found.held_out.items()}
    assert ids["a.jsonl"] == ids["b.parquet"] and ids["c.txt"] == ids["a.jsonl"][:1]
    assert dict(found.rejected["a.jsonl"]) == {"empty": 1, "not JSON in UTF-8": 1}
    assert dict(found.rejected["b.parquet"]) == {"without a text": 1}


# ------------------------------------------------------------------ the command


def test_a_run_is_evaluated_to_what_it_logged_and_its_report_and_card_show_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(run), "--device", "cpu", "--limit", "3"]) == 0
    shown = capsys.readouterr().out
    found = read_results(run)
    assert found is not None
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    web = found["held_out"]["web"]
    assert web["bits_per_byte"] == pytest.approx(logged["eval/web/bits_per_byte"], rel=1e-5)
    assert (found["step"], web["rows"], found["apply_chat_template"]) == (20, 5, False)
    assert found["tasks"]["mini_choice"]["questions"] == 6
    assert set(found["tasks"]["mini_choice"]["members"]) == {"mini_choice_zh", "mini_choice_en"}
    assert 0 <= found["tasks"]["mini_choice_zh_text"]["metrics"]["acc_norm"]["value"] <= 1
    assert found["tasks"]["mini_choice_zh"]["metrics"]["acc"]["stderr"] is not None
    assert {s.split(" is left out")[0] for s in found["left_out"]} == {"ceval-valid", "cmmlu"}
    assert f"{web['bits_per_byte']:.4f}" in shown and as_text(tasks_table(found)) in shown

    report = (run / "report.html").read_text()
    assert "Perplexity by document length" in report and "mini_choice_zh_text" in report
    card = (run / "final" / "README.md").read_text()
    assert "## Benchmarks" in card and f"{web['bits_per_byte']:.4f}" in card
    assert "the first 3 questions of each" in card and str(run) not in card


def test_a_card_shows_no_evaluation_of_other_weights(run: Path) -> None:
    folder = run / "evaluation"
    folder.mkdir()
    found: dict[str, Any] = {"step": 10, "held_out": {}, "limit": None, "apply_chat_template": True}
    found["tasks"] = {
        "a|b": {
            **{"metrics": {"acc": {"value": 0.5, "stderr": None}}, "questions": 2},
            **{"num_fewshot": 0, "version": "1"},
        }
    }
    found["versions"] = {"lm_eval": "9"}
    (folder / "results.json").write_text(json.dumps(found))
    write_card(run / "final", run)
    assert "Benchmarks" not in (run / "final" / "README.md").read_text()
    (folder / "results.json").write_text(json.dumps(found | {"step": 20}))
    write_card(run / "final", run)
    card = (run / "final" / "README.md").read_text()
    assert "Tasks of lm-eval 9, asked through the chat template:" in card
    assert "| a\\|b | acc | 0.5000 | – | 2 | 0 |" in card


def test_a_damaged_evaluation_is_named_and_spoils_neither_card_nor_report(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "evaluation" / "step-best").mkdir(parents=True)  # somebody's copy
    (run / "evaluation" / "results.json").write_text("{")
    write_card(run / "final", run)
    assert "results.json cannot be read" in capsys.readouterr().out
    assert "results.json cannot be read" in write_report(run).read_text()


def test_the_same_seed_gives_the_same_results(run: Path, tmp_path: Path) -> None:
    kept = []
    for place in ("one", "two"):
        flags = ["--limit", "4", "--num_fewshot", "2", "--output_dir", str(tmp_path / place)]
        assert command.main([str(run / "final"), *flags, "--device", "cpu"]) == 0
        found = json.loads((tmp_path / place / "results.json").read_text())
        assert found["tasks"]["mini_choice_zh"]["num_fewshot"] == 2
        kept.append({k: v for k, v in found.items() if k not in ("date", "seconds")})
    assert kept[0] == kept[1]
    assert not (run / "evaluation").exists()


def test_a_checkpoint_is_found_in_a_run_and_as_a_step_and_alone(
    run: Path, foreign: Path, tmp_path: Path
) -> None:
    for given in (run, run / "final"):
        found = find_checkpoint(str(given))
        assert (found.where, found.run, found.step) == (str(run / "final"), run, None)
        assert found.last_step == 20
    step = run / "checkpoints" / "step-10"
    step.mkdir(parents=True)
    shutil.copytree(run / "final", step / "model")
    (step / "state.json").write_text('{"step": 10}')
    (step / "files.json").write_text("{}")
    found = find_checkpoint(str(step))
    assert (found.where, found.run, found.last_step) == (str(step / "model"), run, 10)
    assert command.output_folder(parse_flags([str(step)]), found) == run / "evaluation/step-10"
    shutil.rmtree(run / "final")
    assert find_checkpoint(str(run)).step == 10
    alone = find_checkpoint(str(foreign))
    assert (alone.run, alone.step) == (None, None)
    assert command.output_folder(parse_flags([str(foreign)]), alone) == Path(
        "output/evaluation/gpt2"
    )
    hub = find_checkpoint("owner/name")
    assert command.output_folder(parse_flags(["owner/name"]), hub) == Path(
        "output/evaluation/owner--name"
    )


def test_a_chat_model_is_known_by_where_it_stops_and_not_by_its_template(
    data: SimpleNamespace,
) -> None:
    tokenizer: Any = load_tokenizer(data.tokenizer)
    assert tokenizer.chat_template
    assert not is_chat_model(tokenizer, base_generation_config(tokenizer))
    assert is_chat_model(tokenizer, chat_generation_config(tokenizer))
    tokenizer.chat_template = None
    assert not is_chat_model(tokenizer, chat_generation_config(tokenizer))


@pytest.fixture
def mistaken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Any:
    """Flags -> the sentence; loading a model would fail the test."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(command, "load_model", forbidden)

    def sentence(*flags: object) -> str:
        capsys.readouterr()  # what was said before
        words = [str(flag) for flag in flags]
        assert command.main([*words, "--output_dir", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, said
        return said

    return sentence


def test_mistakes_are_one_sentence_before_a_model_is_loaded(
    mistaken: Any, run: Path, foreign: Path, data: SimpleNamespace, tmp_path: Path
) -> None:
    assert "no/where/at/all does not exist" in mistaken("no/where/at/all")
    assert "is no folder here and cannot be had from the hub" in mistaken("owner/name")
    (tmp_path / "empty").mkdir()
    assert "has no config.json and is no run folder" in mistaken(tmp_path / "empty")
    assert "--txet" in mistaken(run, "--txet", "a.txt")
    assert "--text absent.txt does not exist" in mistaken(run, "--text", "absent.txt")
    assert "is none of .jsonl, .parquet, .txt" in mistaken(run, "--text", "a.pdf")
    (tmp_path / "blank.txt").write_text(" \n")
    said = mistaken(run, "--text", tmp_path / "blank.txt")
    assert "blank.txt holds no document to evaluate on (left out: 1 empty)" in said
    assert "--data: not JSON" in mistaken(run, "--data", "web")
    assert "--eval_data absent is no folder" in mistaken(run, "--eval_data", "absent")
    assert "name it once" in mistaken(run, "--tasks", "mini_choice,mini_choice_zh")
    assert "--seq_len 512 is more than the 96 tokens" in mistaken(
        foreign, "--text", data.packed / "train" / "000000.parquet", "--seq_len", "512"
    )
    assert "nothing to evaluate" in mistaken(foreign, "--skip", "tasks")
    assert "--skip tasks leaves out what --tasks names" in mistaken(
        run, "--skip", "tasks", "--tasks", "cmmlu"
    )
    assert "has no chat template" in mistaken(
        foreign, "--skip", "held_out", "--apply_chat_template", "true"
    )
    assert "--device: tpu cannot be used here" in mistaken(run, "--device", "tpu")
    for seed, why in ((-1, "is too small; give 0 or more"), (2**32, "is too large")):
        assert f"--seed: {seed} {why}" in mistaken(run, "--seed", seed)
    assert "--num_fewshot 6: mini_choice_zh has only 5 solved examples" in mistaken(
        run, "--tasks", "mini_choice_zh", "--num_fewshot", "6"
    )
    shutil.copytree(foreign, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    assert "has no tokenizer that transformers opens" in mistaken(tmp_path / "bare")


@pytest.mark.slow  # reads all of lm-eval's tasks
def test_a_task_that_nobody_knows_is_answered_with_the_nearest_name(
    mistaken: Any, run: Path
) -> None:
    for given, near in {"mini_choise": "mini_choice", "arc_easi": "arc_easy"}.items():
        said = mistaken(run, "--tasks", given)
        assert f"--tasks {given} is no task" in said and f"did you mean {near}?" in said


def test_a_model_that_is_neither_here_nor_on_a_hub_in_reach_is_one_sentence() -> None:
    out_of_reach = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "mini_llm.evaluate", "owner/no-such-model"],
        cwd=REPOSITORY,
        env={**os.environ, **out_of_reach},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == (
        "error: owner/no-such-model is no folder here and cannot be had from the hub (it is not "
        "cached, and the hub cannot be asked); check the path, or the id with HF_ENDPOINT and "
        "HF_TOKEN"
    )


def test_rows_packed_with_another_tokenizer_are_refused(
    mistaken: Any, foreign: Path, data: SimpleNamespace
) -> None:
    said = mistaken(foreign, "--data", json.dumps(data.sources))
    assert "'web' were packed with another tokenizer" in said and "--text FILE" in said


def test_data_of_a_run_that_is_gone_is_named_with_the_ways_on(mistaken: Any, run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(re.sub(r"path: .*", "path: gone/away", config.read_text()))
    said = mistaken(run)
    assert "gone/away does not exist" in said and "--skip held_out" in said


def test_results_that_cannot_be_written_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    (tmp_path / "results.json").mkdir()
    found = {"held_out": {}}, tmp_path, find_checkpoint(str(run))
    monkeypatch.setattr(command, "evaluate", lambda flags: found)
    assert command.main([str(run)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # after progress bars of the fixture
    assert last.startswith("error: [Errno 21] Is a directory")


def test_without_lm_eval_the_extra_is_named_and_held_out_text_is_measured_all_the_same(
    mistaken: Any,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(harness, "is_installed", lambda: False)
    assert "'.[eval]'" in mistaken(run, "--tasks", "cmmlu")
    assert "nothing to evaluate" in mistaken(run, "--skip", "held_out")
    monkeypatch.undo()
    monkeypatch.setattr(harness, "is_installed", lambda: False)
    out = str(tmp_path / "out")
    assert command.main([str(run), "--output_dir", out, "--device", "cpu"]) == 0
    assert "lm-eval is not installed: pip install" in capsys.readouterr().out


def test_help_comes_without_torch_and_at_once() -> None:
    code = (
        "import sys; sys.argv = ['evaluate', '--help']\n"
        "from mini_llm.evaluate.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'transformers', 'datasets', 'numpy', 'lm_eval'} & sys.modules.keys()\n"
        "sys.exit(f'{slow} were imported' if slow else 0)"
    )
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "--apply_chat_template" in done.stdout
    assert time.monotonic() - begun < 60  # seconds; it takes a fraction of one


# ------------------------------------------------------------------ tasks


@pytest.mark.parametrize("language", ["zh", "en"])
def test_bundled_questions_have_four_options_and_each_letter_answers_as_often(
    language: str,
) -> None:
    asked = questions.read(questions.BUNDLED / f"{language}.jsonl")
    shown = questions.read(questions.BUNDLED / f"{language}_dev.jsonl")
    texts = [question["question"] for question in [*asked, *shown]]
    assert len(asked) == 60 and len(set(texts)) == len(texts)
    for question in [*asked, *shown]:
        assert list(question) == ["question", *harness.OPTIONS, "answer"]
        assert len({question[letter] for letter in harness.OPTIONS}) == 4
    answers = [question["answer"] for question in asked]
    assert {letter: answers.count(letter) for letter in "ABCD"} == dict.fromkeys("ABCD", 15)


def test_a_question_in_jsonl_may_hold_any_line_separator_of_unicode(tmp_path: Path) -> None:
    asked = [{"question": "a\u2028b\u2029c\x85d", "A": "1"}, {"question": "e", "A": "2"}]
    lines = [json.dumps(question, ensure_ascii=False) for question in asked]
    path = tmp_path / "law.jsonl"
    path.write_bytes("\r\n".join([*lines, ""]).encode())
    assert questions.read(path) == asked


@pytest.mark.parametrize("language", ["zh", "en"])
def test_bundled_sums_are_right(language: str) -> None:
    words = {"plus": "+", "minus": "-", "times": "*", "×": "*"}
    checked = 0
    for question in questions.read(questions.BUNDLED / f"{language}.jsonl"):
        pattern = r"(?:What is )?(\d+) ?(\+|-|×|plus|minus|times) ?(\d+)(?:等于多少？|\?)"
        if found := re.fullmatch(pattern, question["question"]):
            left, operator, right = found.groups()
            value = eval(f"{left} {words.get(operator, operator)} {right}")
            assert question[question["answer"]] == str(value), question
            checked += 1
    assert checked == 20


@pytest.mark.parametrize(
    "name",
    [
        "mini_qwen3_next_tiny",
        pytest.param("mini_llama3_tiny", marks=pytest.mark.slow),
        pytest.param("mini_deepseekv3_tiny", marks=pytest.mark.slow),
    ],
)
def test_our_class_and_the_stock_class_answer_alike(
    name: str, checkpoints: dict[str, Path], data: SimpleNamespace
) -> None:
    answers = []
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        found = harness.ask(
            harness.prepare(["mini_choice_zh_text"], None),
            load(checkpoints[name]).eval(),
            load_tokenizer(data.tokenizer),
            **{"num_fewshot": 1, "limit": 12, "apply_chat_template": False},
            **{"batch_size": 8, "seed": 0},
        )
        answers.append(found["mini_choice_zh_text"])
    assert answers[0] == answers[1]


def test_a_model_that_knows_the_answer_scores_one_by_letter_and_by_text(
    data: SimpleNamespace, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    asked = questions.read(questions.BUNDLED / "zh.jsonl")
    right = {q["question"]: (q["answer"], q[q["answer"]]) for q in asked}

    def knows(self: Any, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        scores = []
        for context, continuation in (request.args for request in requests):
            (known,) = [answer for question, answer in right.items() if question in context]
            is_right = continuation.strip() in known
            scores.append((0.0 if is_right else -50.0, is_right))
        return scores

    monkeypatch.setattr(HFLM, "loglikelihood", knows)
    found = harness.ask(
        harness.prepare(["mini_choice_zh", "mini_choice_zh_text"], None),
        load_model(checkpoints[LLAMA]),
        load_tokenizer(data.tokenizer),
        **{"num_fewshot": None, "limit": None, "apply_chat_template": False},
        **{"batch_size": 8, "seed": 0},
    )
    for name in ("mini_choice_zh", "mini_choice_zh_text"):
        assert found[name]["metrics"]["acc"] == {"value": 1.0, "stderr": 0.0}
        assert found[name]["questions"] == 60


def write_csv(path: Path, head: str, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8-sig")


@pytest.fixture
def eval_data(tmp_path: Path) -> Path:
    """C-Eval as its archive has it, CMMLU as the hub does: two subjects, options that are odd."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "eval"
    head = "id,question,A,B,C,D,answer"
    for split in ("val", "dev"):
        write_csv(
            folder / f"ceval/{split}/law_{split}.csv",
            head,
            f'0,{split}甲？,0.50,NA,"一,二",none,B',
            f"1,{split}乙？,a,b,c,d,D",
        )
    columns = {
        **{"Question": ["丙？"], "A": [1], "B": [2], "C": [3], "D": [4]},
        **{"Answer": ["C"], "__index_level_0__": [0]},
    }
    for split in ("test", "dev"):
        for place in ("anatomy/{}-00000-of-00001", "arts/cmmlu-{}"):
            path = folder / f"cmmlu/{place.format(split)}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns), path)
    return folder


def test_c_eval_and_cmmlu_are_read_from_a_folder_as_they_stand(eval_data: Path) -> None:
    prepared = harness.prepare(None, eval_data)
    assert prepared.left_out == []
    groups = {group.name: group for group in prepared.tasks}
    wanted = ["ceval-valid", "ceval-valid_text", "cmmlu", "cmmlu_text"]
    assert list(groups) == [*harness.BUNDLED, *wanted]
    (by_letter,), (by_text,) = (groups[n].get_all_tasks() for n in wanted[:2])
    first = by_letter.eval_docs[0]
    assert by_letter.task_name == "ceval-valid_law"
    assert by_letter.doc_to_text(first) == "val甲？\nA. 0.50\nB. NA\nC. 一,二\nD. none\n答案："
    assert (by_letter.doc_to_choice(first), by_letter.doc_to_target(first)) == (list("ABCD"), 1)
    assert by_text.doc_to_choice(first) == ["0.50", "NA", "一,二", "none"]
    assert by_text.doc_to_text(first) == "问题：val甲？\n答案："
    assert by_text.config.target_delimiter == ""
    cmmlu, arts = groups["cmmlu_text"].get_all_tasks()
    assert (cmmlu.task_name, arts.task_name) == ("cmmlu_anatomy_text", "cmmlu_arts_text")
    assert cmmlu.doc_to_choice(cmmlu.eval_docs[0]) == ["1", "2", "3", "4"]
    assert cmmlu.doc_to_target(cmmlu.eval_docs[0]) == 2


def test_c_eval_and_cmmlu_are_asked_with_solved_examples_before_the_question(
    eval_data: Path, checkpoints: dict[str, Path], data: SimpleNamespace
) -> None:
    found = harness.ask(
        harness.prepare(["ceval-valid", "cmmlu_text"], eval_data),
        load_model(checkpoints[LLAMA]).eval(),
        load_tokenizer(data.tokenizer),
        **{"num_fewshot": 1, "limit": None, "apply_chat_template": True},
        **{"batch_size": 2, "seed": 0},
    )
    assert list(found)[:3] == ["ceval-valid", "ceval-valid_law", "cmmlu_text"]
    assert set(found["cmmlu_text"]["members"]) == {"cmmlu_anatomy_text", "cmmlu_arts_text"}
    assert found["ceval-valid"]["questions"] == found["ceval-valid_law"]["questions"] == 2
    assert found["ceval-valid_law"]["num_fewshot"] == 1
    assert found["ceval-valid_law"]["version"] == "2.0"
    assert set(found["cmmlu_text"]["metrics"]) == {"acc", "acc_norm"}


def test_files_with_other_columns_are_named(eval_data: Path) -> None:
    write_csv(eval_data / "ceval/val/law_val.csv", "question,A,B,C,answer", "甲？,1,2,3,A")
    with pytest.raises(UsageError, match=r"law_val.csv is no file of ceval: it lacks D"):
        harness.prepare(None, eval_data)


def test_where_the_data_of_a_named_task_cannot_be_had_the_bundled_ones_are_asked() -> None:
    prepared = harness.prepare(["ceval-valid", "cmmlu_text"], None)
    assert [group.name for group in prepared.tasks] == list(harness.BUNDLED)
    first, second, last = prepared.left_out
    assert first.startswith("ceval-valid is left out: its data cannot be had")
    assert "hf download ceval/ceval-exam" in first and "hf download haonan-li/cmmlu" in second
    assert last == "mini_choice and mini_choice_text are asked instead"
