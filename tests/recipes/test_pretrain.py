"""recipes/pretrain.py as a user starts it, and what it says to a user's mistakes."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mini_llm import build_model, load_model
from mini_llm.data import load_tokenizer
from mini_llm.hub.push import find_source
from mini_llm.training.run_folder import code_version
from tests.conftest import TinyData
from tests.launching import REPOSITORY, TINY_RUN, facts, launch, metrics, series
from tests.metrics_page import names_without_a_row
from tests.trackers import assert_trackers_have_what_metrics_jsonl_has


@pytest.fixture(scope="module")
def finished_run(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, six steps, two profiled, evaluation, samples, TensorBoard and W&B offline."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    launch(
        *(*TINY_RUN, *tiny_data.flags, "--output_dir", str(output_dir)),
        *("--max_steps", "6", "--logging_steps", "2", "--eval_steps", "3", "--save_steps", "2"),
        *("--max_eval_rows", "0", "--profile_steps", "3:4"),
        *("--save_total_limit", "2", "--report_to", "tensorboard,wandb"),
        *("--sample_prompts", '["a model", "训练"]', "--sample_max_new_tokens", "8"),
        config="zero2",
        env={"WANDB_MODE": "offline"},
    )
    return output_dir


def test_a_run_leaves_the_files_of_the_run_folder(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "logs",
        "plots",
        "checkpoints",
        "final",
    } <= names
    assert (finished_run / "plots" / "loss.png").read_bytes()[1:4] == b"PNG"
    report = (finished_run / "report.html").read_text()
    total = facts(finished_run)["parameters"]["total"]
    assert f"{total:,} parameters, trained for 6 of 6 optimizer steps" in report
    assert report.count("data:image/png;base64,") == len(list((finished_run / "plots").iterdir()))
    assert "--- answer 2" in report  # it was written after them
    assert {path.name for path in (finished_run / "final").iterdir()} >= {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert sorted(path.name for path in (finished_run / "checkpoints").iterdir()) == [
        "step-4",  # save_total_limit 2: step-2 went
        "step-6",
    ]
    samples = (finished_run / "samples.txt").read_text()
    assert re.findall(r"^=== step (\d+)", samples, re.MULTILINE) == ["1", "3", "6"]
    assert samples.count("--- prompt 1") == samples.count("--- answer 2") == 3
    tensorboard = list((finished_run / "logs").rglob("events.out.tfevents*"))
    assert any(path.stat().st_size > 500 for path in tensorboard)


def test_profiled_steps_leave_a_trace_of_each_rank_with_just_their_operators(finished_run):
    updates = []
    for rank in (0, 1):
        folder = finished_run / "profile" / f"rank-{rank}"
        assert [path.name for path in folder.iterdir()] == ["trace.json.gz"]  # no GPU here
        with gzip.open(folder / "trace.json.gz", "rt") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        updates.append(names.count("Optimizer.step#AdamW.step"))
        assert "aten::mm" in names and "[memory]" in names
    assert updates == [4, 4]  # two steps, in each of which ZeRO updates two groups by themselves


def test_the_log_of_every_rank_begins_with_the_facts_of_the_run(finished_run):
    logs = [(finished_run / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    host, versions = os.uname().nodename, facts(finished_run)["versions"]
    fingerprint = facts(finished_run)["data_fingerprint"]
    for rank, log in enumerate(logs):
        assert f"rank {rank} of 2 starts on {host} as process " in log.splitlines()[0]
        assert f"ranks  2 on 1 host(s): {host} (ranks 0-1)" in log
        assert "DeepSpeed ZeRO-2 on 2 rank(s), cpu, fp32" in log and "attention sdpa" in log
        assert f"fingerprint {fingerprint[:12]}" in log and f"this code {code_version()}" in log
        assert f"torch {versions['torch']}" in log and "logs/rank-<r>.log" in log
    assert "step 2/6" in logs[0] and "step 2/6" not in logs[1]


def test_metrics_hold_the_documented_keys_at_the_steps_asked_for(finished_run, tiny_data):
    logged = metrics(finished_run)
    assert [m["step"] for m in logged] == [1, 2, 3, 4, 6]
    assert [m["step"] for m in logged if "train/loss" in m] == [1, 2, 4, 6]
    assert [m["step"] for m in logged if "eval/tiny/loss" in m] == [1, 3, 6]
    last = logged[-1]
    assert last.keys() == {
        *("step", "train/loss", "train/perplexity", "train/grad_norm", "train/lr", "train/tokens"),
        *("train/bad_steps", "perf/tokens_per_second", "perf/mfu", "data/tiny/tokens"),
        *("perf/step_seconds", "perf/data_seconds", "perf/forward_seconds"),
        *("perf/backward_seconds", "perf/optimizer_seconds", "perf/communication_seconds"),
        "perf/peak_memory_bytes",
        *("eval/tiny/loss", "eval/tiny/bits_per_byte", "samples/stopped", "samples/tokens"),
    }
    assert last["perf/mfu"] is None  # a CPU's peak is not known
    assert np.isclose(last["train/perplexity"], np.exp(last["train/loss"]))
    assert 0.9 * 6 * 1024 < last["train/tokens"] <= 6 * 1024  # packed rows are nearly full
    assert last["train/tokens"] == last["data/tiny/tokens"]


def test_the_trackers_have_what_metrics_jsonl_has_under_documented_names(finished_run):
    assert len(list((finished_run / "logs" / "wandb").glob("offline-run-*"))) == 1  # rank 0's
    assert_trackers_have_what_metrics_jsonl_has(finished_run)
    names = {name for line in metrics(finished_run) for name in line} - {"step"}
    assert names_without_a_row(names) == []


def test_held_out_loss_equals_a_plain_evaluation_of_the_final_model(finished_run, tiny_data):
    from mini_llm.data import collate, load_tokenizer, token_byte_lengths, validation_rows

    model = load_model(finished_run / "final").eval()
    tokenizer = load_tokenizer(tiny_data.tokenizer)
    num_bytes, nats, tokens = 0, 0.0, 0
    for row in validation_rows(tiny_data.packed):
        batch = collate([row])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        targets = batch["labels"][0, 1:]
        counted = targets != -100
        log_p = logits[0, :-1].log_softmax(-1)[counted, targets[counted]]
        nats -= log_p.double().sum().item()
        tokens += int(counted.sum())
        num_bytes += int(token_byte_lengths(tokenizer)[targets[counted]].sum())
    last = metrics(finished_run)[-1]
    assert np.isclose(last["eval/tiny/loss"], nats / tokens, rtol=1e-5)
    assert np.isclose(last["eval/tiny/bits_per_byte"], nats / np.log(2) / num_bytes, rtol=1e-5)


STOCK_PROCESS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, out = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
texts = ["a model", "loss model token row packs", "训练"]
batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
greedy = dict(max_new_tokens=12, do_sample=False)
batched = model.generate(**batch, **greedy)
one_by_one = [model.generate(**tokenizer(t, return_tensors="pt"), **greedy) for t in texts]
width = batch["input_ids"].shape[1]
result = {
    "class": type(model).__module__ + "." + type(model).__name__,
    "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
    "imported": "mini_llm" in sys.modules,
    "batched": [tokenizer.decode(row[width:], skip_special_tokens=True) for row in batched],
    "single": [
        tokenizer.decode(row[0, len(tokenizer(t)["input_ids"]):], skip_special_tokens=True)
        for row, t in zip(one_by_one, texts)
    ],
    "round_trip": tokenizer.decode(tokenizer("naïve\\t模型\\n x")["input_ids"]),
}
tokens = torch.arange(1, 61).reshape(2, 30)
torch.save(model(tokens).logits, out + ".pt")
json.dump(result, open(out + ".json", "w"))
"""


def test_final_opens_in_a_process_that_has_only_transformers(finished_run, tmp_path):
    command = [
        sys.executable,
        "-c",
        STOCK_PROCESS,
        str(finished_run / "final"),
        str(tmp_path / "out"),
    ]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["class"].startswith("transformers.") and not result["imported"]
    assert result["missing"] == [] and result["unexpected"] == []
    assert result["batched"] == result["single"] and any(result["batched"])
    assert result["round_trip"] == "naïve\t模型\n x"
    ours = load_model(finished_run / "final").eval()
    logits = ours(torch.arange(1, 61).reshape(2, 30)).logits
    assert (torch.load(tmp_path / "out.pt") - logits).abs().max() <= 1e-5


def test_the_saved_weights_name_each_tied_weight_once(finished_run):
    from safetensors import safe_open

    with safe_open(finished_run / "final" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    config = json.loads((finished_run / "final" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in config


def test_config_yaml_repeats_the_run_and_a_finished_run_is_not_run_again(finished_run):
    before = (finished_run / "metrics.jsonl").read_text()
    done = launch("--config", str(finished_run / "config.yaml"), config="zero2")
    assert "is already at step 6; nothing to do" in done.stdout
    assert (finished_run / "metrics.jsonl").read_text() == before


def test_a_finished_run_without_its_checkpoints_is_done_and_refuses_only_to_go_on(
    finished_run, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "checkpoints")
    flags = ("--config", str(run / "config.yaml"), "--output_dir", str(run))
    done = launch(*flags, config="single", processes=1)
    assert "is already at step 6; nothing to do" in done.stdout
    longer = launch(*flags, "--max_steps", "8", config="single", processes=1, check=False)
    assert "it has no checkpoints to go on from" in longer.stdout
    assert (run / "final").is_dir() and not (run / "checkpoints").exists()


@pytest.mark.slow
def test_a_finished_run_that_goes_on_has_no_final_model_until_it_is_finished_again(
    finished_run, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    flags = ("--config", str(run / "config.yaml"), "--output_dir", str(run), "--max_steps", "8")
    flags = (*flags, "--report_to", "none", "--sample_prompts", "[]")
    done = launch(*flags, "--stop_at_step", "7", config="zero2")
    assert f"its final/ of step 6 is now {run}/final-step-6" in done.stdout
    assert not (run / "final").exists()
    before, after = finished_run / "final", run / "final-step-6"
    weights = "model.safetensors"
    assert (before / weights).read_bytes() == (after / weights).read_bytes()
    assert find_source(run).step == 7  # what is pushed, evaluated and talked to


def test_bare_accelerate_launch_builds_the_quickstart_data_and_trains_with_zero1(tmp_path):
    shutil.copytree(REPOSITORY / "recipes", tmp_path / "recipes")
    done = launch("--max_steps", "2", config=None, cwd=tmp_path)
    assert "quickstart data: prepare_pretrain" in done.stdout
    run = tmp_path / "output" / "quickstart" / "pretrain"
    assert facts(run)["zero_stage"] == 1 and facts(run)["world_size"] == 1
    assert facts(run)["distributed_type"] == "DEEPSPEED"
    assert [m["step"] for m in metrics(run)] == [1, 2]
    assert len(series(run, "eval/quickstart/loss")) == 2


def test_deepspeed_none_trains_in_one_plain_process(tiny_data, tmp_path):
    flags = [*TINY_RUN, *tiny_data.flags, "--output_dir", str(tmp_path), "--max_steps", "2"]
    launch(*flags, "--deepspeed", "none", config="single", processes=1)
    run = facts(tmp_path)
    assert (run["distributed_type"], run["zero_stage"], run["world_size"]) == ("NO", None, 1)
    assert run["wrapper"] == "MiniLlama3ForCausalLM"


def test_two_processes_that_become_one_are_refused(tiny_data, tmp_path):
    flags = [*TINY_RUN, *tiny_data.flags, "--output_dir", str(tmp_path)]
    done = launch(*flags, config="single", processes=2, check=False)
    assert done.returncode != 0
    assert "error: 2 processes were asked for but the job has 1" in done.stdout
    assert not (tmp_path / "metrics.jsonl").exists()


def test_dry_run_prints_config_sizes_and_two_decoded_rows_and_writes_nothing(tiny_data, tmp_path):
    output_dir = tmp_path / "run"
    flags = [*TINY_RUN, *tiny_data.flags, "--output_dir", str(output_dir)]
    done = launch(*flags, "--warmup_steps", "20", "--dry_run", processes=2)
    assert "warning               --warmup_steps 20 leaves nothing of --max_steps 20" in done.stdout
    assert "max_steps: 20" in done.stdout and "memory per rank" in done.stdout
    assert "tokens per step       1,024 = 2 rank(s) × 2 micro-batch(es) × 4 row(s)" in done.stdout
    # Between two ranks a ring sends S for an all-reduce of S, and half of it for an all-gather.
    gradients = 4 * int(re.search(r"([\d,]+) parameters", done.stdout)[1].replace(",", "")) / 1e6
    assert (
        f"sent per rank, step   {1.5 * gradients:.3f} MB under zero1 (gradients {gradients:.3f}, "
        f"weights {gradients / 2:.3f}" in done.stdout
    )
    assert "row 1 of tiny" in done.stdout and "row 2 of tiny" in done.stdout
    assert "<|endoftext|>" in done.stdout and not output_dir.exists()


# ---- Mistakes: one sentence, before any model is built -----------------------------------------


def test_unknown_model_is_refused_with_the_nearest_preset(stopped):
    text = stopped("--model", "mini_lama3")
    assert "--model: 'mini_lama3'" in text and "did you mean 'mini_llama3'" in text


def test_missing_data_folder_is_refused(stopped):
    text = stopped("--data", '{"tiny": {"path": "no/such/folder", "weight": 1}}')
    assert "--data" in text and "no/such/folder" in text


def test_data_without_a_path_is_refused(stopped):
    text = stopped("--data", '{"tiny": {"weight": 1}}')
    assert "--data" in text and "path" in text


def test_a_checkpoint_with_another_vocabulary_is_refused(stopped, finished_run, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(finished_run / "final", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 999}))
    text = stopped("--model", str(other))
    assert "--tokenizer has 324 entries" in text and "999" in text


def test_missing_tokenizer_is_refused(stopped):
    text = stopped("--tokenizer", "no/such/tokenizer")
    assert "--tokenizer" in text and "no/such/tokenizer" in text


def test_data_packed_with_another_tokenizer_is_refused(stopped, tiny_data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_data.tokenizer, other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert "--tokenizer" in stopped("--tokenizer", str(other))


def test_another_sequence_length_than_the_packed_rows_is_refused(stopped):
    text = stopped("--seq_len", "128")
    assert "--seq_len" in text and "128" in text and "64" in text


def test_a_global_batch_that_the_ranks_cannot_divide_is_refused(stopped, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "--global_batch_tokens 1024 cannot be divided over 3 rank(s)" in stopped()


def test_a_folder_with_another_run_is_refused_with_the_differing_keys(stopped, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"identity": {"seed": 7}}))
    text = stopped()
    assert "--output_dir" in text and "seed: 7 there, 42 here" in text
    (tmp_path / "run" / "run.json").write_text("{")
    assert "run/run.json cannot be read (Expecting" in stopped()


def test_a_checkpoint_path_that_is_none_is_refused(stopped, tmp_path):
    text = stopped("--resume_from_checkpoint", str(tmp_path))
    assert "--resume_from_checkpoint" in text and "no state.json" in text


def test_a_mistake_is_printed_once_by_two_ranks_and_ends_the_launch(tmp_path):
    done = launch("--learning_rates", "1", processes=2, check=False)
    assert done.returncode != 0
    assert done.stdout.count("unknown flag --learning_rates") == 1


def test_a_model_that_cannot_train_is_refused_before_the_quickstart_data_are_built(tmp_path):
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "recipes/pretrain.py"), "--model", "mini_lama3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "--model: 'mini_lama3' is neither a preset nor" in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_answers_without_importing_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['recipes/pretrain.py', '--help']\n"
        "try:\n    runpy.run_path('recipes/pretrain.py', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "--global_batch_tokens" in done.stdout


@pytest.mark.slow
def test_quickstart_ends_with_a_model_that_answers_and_a_second_call_reuses_what_is_done():
    def quickstart() -> str:
        done = subprocess.run(
            ["./launch.sh", "quickstart"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    quickstart()
    folder = REPOSITORY / "output" / "quickstart"
    runs = [folder / "pretrain", folder / "sft"]
    for run, name, nats in zip(runs, ["quickstart", "docstrings"], [2.5, 1.5], strict=True):
        held_out = series(run, f"eval/{name}/loss")
        assert held_out[0] - held_out[-1] >= nats
        assert facts(run)["world_size"] == 2 and facts(run)["zero_stage"] == 1

    # Asked about functions of its training set, it answers in the trained format and stops. The
    # answers are drawn: the likeliest ones of a model of this size are few and go round in circles
    # or not by chance, and the same question ("And what does it do?") would count many times.
    corpus = folder / "data" / "corpus" / "sft" / "sft_data_en.jsonl"
    records = [json.loads(line) for line in corpus.read_text().splitlines()[:400:10]]
    answered = {}
    for run in runs:
        tokenizer = AutoTokenizer.from_pretrained(run / "final")
        model = AutoModelForCausalLM.from_pretrained(run / "final").eval()
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        torch.manual_seed(0)
        answered[run.name] = 0
        for record in records:
            question = [{"role": "user", "content": record["input"]}]
            inputs = tokenizer.apply_chat_template(
                question, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            drawn = model.generate(
                **inputs, max_new_tokens=96, do_sample=True, temperature=1.0, top_k=0
            )
            answer = drawn[0, inputs["input_ids"].shape[1] :].tolist()
            text = tokenizer.decode(answer[:-1])
            answered[run.name] += bool(answer[-1] == end and text.strip() and "<|" not in text)
    assert answered["sft"] >= 0.8 * len(records)
    assert answered["pretrain"] == 0  # the ending is learnt in fine-tuning, not there before

    before = [(run / "metrics.jsonl").stat().st_mtime_ns for run in runs]
    assert quickstart().count("nothing to do") >= 2
    assert [(run / "metrics.jsonl").stat().st_mtime_ns for run in runs] == before


def test_weights_of_another_tokenizer_of_the_same_size_are_refused(
    stopped, tiny_data, tmp_path, capsys
):
    folder = tmp_path / "other"
    tokenizer = load_tokenizer(tiny_data.tokenizer)
    build_model("mini_llama3_tiny", vocab_size=len(tokenizer)).save_pretrained(folder)
    shutil.copytree(tiny_data.tokenizer, folder, dirs_exist_ok=True)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-6:-4]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    capsys.readouterr()  # the progress bar of save_pretrained
    text = stopped("--model", str(folder), "--model_overrides", "{}")
    assert "is not the one that --model" in text and f"give --tokenizer {folder}" in text


@pytest.mark.slow
def test_decay_branched_from_a_checkpoint_of_another_run_continues_it_with_its_own_schedule(
    tiny_data, tmp_path
):
    """WSD: a long run in its stable part, and a short decay from one of its checkpoints."""
    engine = {"config": "single", "processes": 1}
    flags = [*TINY_RUN, *tiny_data.flags, "--deepspeed", "none", "--lr_scheduler_type", "wsd"]
    long_run, branch = tmp_path / "long", tmp_path / "branch"
    launch(
        *(*flags, "--output_dir", str(long_run), "--max_steps", "1000", "--stop_at_step", "6"),
        *("--save_steps", "4"),
        **engine,
    )
    done = launch(
        *(*flags, "--output_dir", str(branch), "--max_steps", "8", "--decay_steps", "4"),
        *("--resume_from_checkpoint", str(long_run / "checkpoints/step-4")),
        **engine,
    )
    assert "is not a checkpoint of the run in" in done.stdout
    assert [m["step"] for m in metrics(branch)] == [5, 6, 7, 8]
    rates = series(branch, "train/lr")
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(3e-4)
    # The step after the checkpoint has the same rows and weights in both runs.
    assert series(branch, "train/loss")[0] == series(long_run, "train/loss")[4]
    assert series(long_run, "train/lr")[4] == pytest.approx(3e-3)
