"""recipes/sft.py as a user starts it, under several engines, and what it says to mistakes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mini_llm.data.sft_files import load_sft_manifest
from tests.conftest import TINY_MODELS, TinyConversations, TinyData
from tests.launching import SFT_RUN, facts, launch, launch_several, metrics, series

LLAMA, DEEPSEEK, QWEN = TINY_MODELS
STEPS, ROWS = 6, 16  # of SFT_RUN: its steps and the rows of a step
PROMPTS = ["0 what is it", [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]]


@pytest.fixture(scope="module")
def finished_run(
    tiny_conversations: TinyConversations, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One epoch on two ranks under ZeRO-2, with evaluation, samples and TensorBoard."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    launch(
        *(*SFT_RUN, *tiny_conversations.flags(LLAMA), "--output_dir", str(output_dir)),
        *("--num_train_epochs", "1", "--learning_rate", "3e-3", "--eval_steps", "10"),
        *("--report_to", "tensorboard", "--max_eval_rows", "0"),
        *("--sample_prompts", json.dumps(PROMPTS), "--sample_max_new_tokens", "24"),
        recipe="sft",
        config="zero2",
    )
    return output_dir


@pytest.fixture(scope="module")
def runs(
    tiny_conversations: TinyConversations, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Runs of every model: packed under ZeRO-2 and 3 on two ranks, padded on one process."""
    folder = tmp_path_factory.mktemp("runs")

    def flags(name: str, model: str, *more: str) -> list[str]:
        base = [*SFT_RUN, *tiny_conversations.flags(model)]
        return [*base, "--output_dir", str(folder / name), *more]

    halfway = ("--stop_at_step", str(STEPS // 2))
    asked = ("--eval_steps", "2", "--sample_prompts", '["a"]', "--sample_max_new_tokens", "4")
    launch_several(
        [
            *(flags(f"zero2-{model}", model) for model in TINY_MODELS),
            flags("interrupted", DEEPSEEK, *asked, *halfway),
            flags("interrupted", DEEPSEEK, *asked),
            flags("moved", DEEPSEEK, *halfway),
        ],
        folder / "zero2.json",
        recipe="sft",
        config="zero2",
    )
    launch_several(
        [flags("moved", DEEPSEEK), flags(f"zero3-{QWEN}", QWEN)],
        folder / "zero3.json",
        recipe="sft",
        config="zero3",
    )
    launch_several(
        [
            flags(f"padded-{model}", model, "--packing", "false", "--deepspeed", "none")
            for model in TINY_MODELS
        ],
        folder / "single.json",
        recipe="sft",
        config="single",
        processes=1,
    )
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


def weights(run: Path, folder: str = "final") -> dict[str, torch.Tensor]:
    return load_file(run / folder / "model.safetensors")


def test_a_run_leaves_a_chat_model_that_plain_transformers_opens(
    finished_run: Path, tiny_conversations: TinyConversations
) -> None:
    final = finished_run / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = AutoModelForCausalLM.from_pretrained(final)
    assert type(model).__name__ == "LlamaForCausalLM"
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert GenerationConfig.from_pretrained(final).eos_token_id == ends
    question = [{"role": "user", "content": "what is it"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    card = (final / "README.md").read_text()
    start = tiny_conversations.models[LLAMA]
    assert f"fine-tuned from `{start.parent.name}/{start.name}` with mini-llm for " in card
    assert str(start.parent) not in card  # a path of this machine says nothing elsewhere
    assert "![loss over optimizer steps](loss.png)" in card and (final / "loss.png").is_file()
    assert "apply_chat_template" in card


def test_a_run_learns_watches_itself_and_leaves_its_pictures_and_answers(
    finished_run: Path, tiny_conversations: TinyConversations
) -> None:
    found = facts(finished_run)
    assert (found["world_size"], found["zero_stage"]) == (2, 2)
    split = load_sft_manifest(tiny_conversations.packed).splits["train"]
    logged = metrics(finished_run)
    steps = -(-split.rows // ROWS)
    assert logged[-1]["step"] == steps  # one epoch, the last step being filled from the next
    assert logged[-1]["train/epoch"] == pytest.approx(steps * ROWS / split.rows)
    supervised = sum(series(finished_run, "train/supervised_tokens"))
    per_row = split.supervised_tokens / split.rows
    assert supervised == pytest.approx(per_row * steps * ROWS, rel=0.05)
    losses = series(finished_run, "train/loss")
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]
    held_out = series(finished_run, "eval/tiny/loss")
    assert held_out[-1] < 0.8 * held_out[0]
    assert all("samples/stopped" in step for step in logged if "eval/tiny/loss" in step)
    text = (finished_run / "samples.txt").read_text()
    assert "0 what is it" in text
    for picture in ("loss", "packing", "attention_mask"):
        assert (finished_run / "plots" / f"{picture}.png").read_bytes()[1:4] == b"PNG"
    assert "What the packed rows hold" in (finished_run / "report.html").read_text()


@pytest.mark.parametrize("model", TINY_MODELS)
def test_packed_on_two_ranks_and_padded_on_one_process_train_alike(
    model: str, runs: dict[str, Path]
) -> None:
    packed, padded = runs[f"zero2-{model}"], runs[f"padded-{model}"]
    assert (facts(packed)["world_size"], facts(packed)["zero_stage"]) == (2, 2)
    assert (facts(padded)["world_size"], facts(padded)["zero_stage"]) == (1, None)
    for key in ("train/loss", "train/grad_norm"):
        assert len(series(packed, key)) == STEPS
        assert series(packed, key) == pytest.approx(series(padded, key), rel=1e-4)


def test_zero3_trains_as_zero2(runs: dict[str, Path]) -> None:
    assert facts(runs[f"zero3-{QWEN}"])["zero_stage"] == 3
    there, here = runs[f"zero2-{QWEN}"], runs[f"zero3-{QWEN}"]
    assert series(here, "train/loss") == pytest.approx(series(there, "train/loss"), rel=1e-5)


def test_what_is_kept_as_pretrained_is_kept_to_the_bit(
    runs: dict[str, Path], tiny_conversations: TinyConversations
) -> None:
    before = load_file(tiny_conversations.models[DEEPSEEK] / "model.safetensors")
    after = weights(runs[f"zero2-{DEEPSEEK}"])
    assert after.keys() == before.keys()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    mtp_layer = TINY_MODELS[DEEPSEEK]["num_hidden_layers"]
    expected = {name for name in before if name.startswith(f"model.layers.{mtp_layer}.")}
    expected -= {name for name in expected if "embed_tokens" in name or "shared_head.head" in name}
    expected |= {name for name in before if name.endswith("e_score_correction_bias")}
    assert expected and kept == expected


def test_interruption_evaluation_and_samples_change_no_bit(runs: dict[str, Path]) -> None:
    whole, resumed = runs[f"zero2-{DEEPSEEK}"], runs["interrupted"]
    assert len(series(resumed, "samples/stopped")) == 4  # after steps 1, 2, 4 and 6
    assert series(resumed, "train/loss") == series(whole, "train/loss")
    expected = weights(whole)
    for name, weight in weights(resumed).items():
        assert torch.equal(weight, expected[name]), name


def test_a_run_with_frozen_layers_goes_on_under_another_zero_stage(runs: dict[str, Path]) -> None:
    whole, moved = runs[f"zero2-{DEEPSEEK}"], runs["moved"]
    assert facts(moved)["zero_stage"] == 3
    losses = series(moved, "train/loss")
    assert losses == pytest.approx(series(whole, "train/loss"), rel=1e-5)
    expected = weights(whole)
    for name, weight in weights(moved).items():
        assert torch.allclose(weight, expected[name], atol=1e-5), name


def broken_tokenizer(data: TinyConversations, folder: Path) -> Path:
    """The model of LLAMA with a chat template that marks no generation."""
    AutoModelForCausalLM.from_pretrained(data.models[LLAMA]).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(data.models[LLAMA])
    unmarked = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", tokenizer.chat_template)
    assert unmarked != tokenizer.chat_template
    tokenizer.chat_template = unmarked
    tokenizer.save_pretrained(folder)
    return folder


def test_a_mistake_gets_one_sentence_that_names_it_before_anything_is_built(
    stopped_sft: Any, tiny_conversations: TinyConversations, tiny_data: TinyData, tmp_path: Path
) -> None:
    unanswered = tmp_path / "unanswered.jsonl"
    unanswered.write_text('{"messages": [{"role": "user", "content": "hello?"}]}\n' * 9)
    raw = ("--max_eval_rows", "4", "--num_train_epochs", "0")

    def source(path: Path) -> list[str]:
        return ["--data", json.dumps({"x": {"path": str(path)}})]

    broken = broken_tokenizer(tiny_conversations, tmp_path / "broken")
    for flags, named in [
        (["--model", "mini_llama3_tiny"], ["--model", "preset"]),
        (["--model", str(tmp_path)], ["--model", "config.json"]),
        (["--model", "nobody/nothing-here"], ["--model", "from the hub", "HF_TOKEN"]),
        (source(tiny_data.packed), ["--data", "prepare_sft.py"]),
        ([*source(unanswered), *raw], ["--data", "no_assistant_turn", "9"]),
        (["--seq_len", "96", "--global_batch_tokens", "1536"], ["--seq_len", "160"]),
        (["--sample_prompts", '[[{"role": "user"}]]'], ["--sample_prompts"]),
        ([*source(tiny_conversations.raw), "--num_train_epochs", "1"], ["--max_steps"]),
        (["--model", str(broken)], ["generation", "--tokenizer"]),
    ]:
        sentence = stopped_sft(*flags)
        for word in named:
            assert word in sentence, (flags, sentence)
