"""python -m mini_llm.bench: that it measures what it says, not how fast anything is."""

import ast
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import ANY

import numpy as np
import psutil
import pytest
import torch
from accelerate.utils import set_seed

from mini_llm import build_model
from mini_llm.bench import __main__ as bench
from mini_llm.bench import attention, loops, step
from mini_llm.bench.data import _packed
from mini_llm.bench.loops import keep_ligers_loss_from_compile
from mini_llm.bench.measure import allocations, interleaved, peak_memory
from mini_llm.bench.names import PARTS, PEERS
from mini_llm.bench.operators import Operators
from mini_llm.bench.step import made_up_rows
from tests.launching import REPOSITORY
from tests.unit.prepare_fixtures import write_shards


def test_variants_take_turns_after_one_call_each_that_is_not_timed() -> None:
    calls: list[str] = []
    variants = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    seconds = interleaved(variants, repeats=3)
    assert "".join(calls) == "ab" + "ababab"
    assert [(len(of["cpu"]), len(of["clock"])) for of in seconds.values()] == [(3, 3), (3, 3)]


def test_data_figures_are_printed_and_written_with_what_they_were_taken_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mini_llm.bench.data.STREAM_TOKENS", 1 << 16)
    write_shards(tmp_path / "in", 2)
    flags = ["--seq_len", "64", "--repeats", "1", "--json", str(tmp_path / "figures.json")]
    bench.main(["data", "--input", str(tmp_path / "in"), *flags])
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert "120 documents" in printed and "M tokens/s" in printed
    assert figures["tokens"] > 0 and 0 < figures["utilisation"] <= 1
    ours = figures["tokenise_and_pack_tokens_per_second"]
    theirs = figures["encode_batch_and_pack_tokens_per_second"]
    assert figures["ratio"] == pytest.approx(ours / theirs)
    assert {"machine", "threads", "tokenizers", "tiktoken", "datasets"} <= figures.keys()


@pytest.mark.parametrize("vocab_size", [1 << 16, 100_000])
def test_ids_of_any_vocabulary_are_measured_as_they_are(vocab_size: int) -> None:
    ids = made_up_rows(vocab_size, 64, 64)
    assert vocab_size - 1000 < ids.max() < vocab_size
    last = np.arange(vocab_size - 8, vocab_size)
    packed = _packed([last], 16, vocab_size)
    assert packed.input_ids[0, :8].tolist() == last.tolist()
    dtype = np.uint16 if vocab_size == 1 << 16 else np.uint32
    assert ids.dtype == packed.input_ids.dtype == dtype


def until(is_so: Callable[[], bool]) -> None:
    """Wait until it is; fail if it never is."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended, waited for or not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_benchmark_ends_what_it_has_launched(
    number: signal.Signals, tmp_path: Path
) -> None:
    launched = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "print(os.getpid(), child.pid, flush=True)\n"
        "child.wait()\n"
    )
    script = (
        "import runpy, sys\n"
        "from pathlib import Path\n"
        "from mini_llm.bench import measure, traffic\n"
        f"command = [sys.executable, '-c', {launched!r}]\n"
        f"place = {{'log': Path({str(tmp_path / 'log')!r}), 'environment': {{}}}}\n"
        "traffic.run = lambda *_, **__: measure.run_to_its_end(command, **place)\n"
        "sys.argv[1:] = ['traffic']\n"
        "runpy.run_module('mini_llm.bench', run_name='__main__')\n"
    )
    benchmark = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY)
    log = tmp_path / "log"
    until(lambda: log.is_file() and log.read_text().endswith("\n"))
    launched_processes = [psutil.Process(int(number)) for number in log.read_text().split()]
    assert len(launched_processes) == 2 and all(map(runs, launched_processes))
    benchmark.send_signal(number)
    assert benchmark.wait(timeout=60) == 128 + number
    until(lambda: not any(map(runs, launched_processes)))


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
ATTENTION_FLAGS += ["--rows", "2", "--device", "cpu"]


@pytest.fixture
def one_preset_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mini_llm.bench.attention.list_models", lambda: ["mini_llama3"])
    monkeypatch.setattr("mini_llm.bench.attention.DTYPES", {"fp32": torch.float32})


@pytest.mark.usefixtures("one_preset_in_fp32")
def test_attention_figures_are_of_equal_results_at_three_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.main([*ATTENTION_FLAGS, "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    printed = capsys.readouterr().out
    for name in ("mini_llama3 attention fp32", "mini_llama3 layer fp32", "mini_llama3_tiny fp32"):
        assert name in printed
        assert min(figures[name].values()) > 0
    attention = figures["mini_llama3 attention fp32"]
    # Bytes of two rows; so much for gradients.
    query, key_and_value = 2 * 64 * 12 * 64 * 4, 2 * 2 * 64 * 4 * 64 * 4
    assert attention["packed_peak_mib"] * 2**20 > query + key_and_value
    assert 1 / 3 <= figures["blocks_of_square"] < 1


@pytest.mark.usefixtures("one_preset_in_fp32")
def test_a_way_that_gives_no_numbers_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(*args: Any, **how: Any) -> tuple[torch.Tensor, None]:
        output, _ = real(*args, **how)
        return output * (torch.nan if how.get("documents") is not None else 1), None

    real = attention.attend
    monkeypatch.setattr(attention, "attend", attend)
    with pytest.raises(SystemExit):
        bench.main(ATTENTION_FLAGS)


@pytest.mark.usefixtures("one_preset_in_fp32")
def test_a_mask_that_leaks_between_documents_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    causal = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    monkeypatch.setattr("mini_llm.bench.attention.block_diagonal_mask", lambda *_: causal)
    with pytest.raises(SystemExit) as end:
        bench.main(ATTENTION_FLAGS)
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("mini_llama3 attention fp32: the two ways' results differ")


def test_more_documents_than_tokens_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["attention", "--seq_len", "4", "--documents", "5"])
    assert capsys.readouterr().err == "--documents: 5 is not between 1 and --seq_len 4\n"


STOCK = "stock Accelerate + DeepSpeed ZeRO-1, this project's class"
STEP_FLAGS = [
    *("step", "--model_overrides", json.dumps({"num_hidden_layers": 1, "vocab_size": 64})),
    *("--rows", "2", "--seq_len", "16", "--steps", "2", "--device", "cpu"),
]


def _step_figures(folder: Path, *flags: str) -> dict[str, Any]:
    figures, table = folder / "figures.json", folder / "table.md"
    bench.main([*STEP_FLAGS, *flags, "--json", str(figures), "--markdown", str(table)])
    found: dict[str, Any] = json.loads(figures.read_text())
    for name, of in found["loops"].items():
        assert f"| {name} |" in table.read_text()
        assert min(of["clock_seconds"], of["cpu_seconds"], of["tokens_per_second"]) > 0
        assert min(of["operators"], of["peak_memory_bytes"]) > 0 and of["host_syncs"] is not None
    return found


def test_step_of_the_recipe_and_of_a_bare_loop_are_taken_in_turns_and_written(
    tmp_path: Path,
) -> None:
    found = _step_figures(tmp_path, "--peers", "bare", "--micro_batches", "2")
    recipe, bare = found["loops"].values()
    assert found["steps"] == 2 and found["compared"] == "cpu"
    assert found["ratios"] == {"recipe, engine none": {PEERS["bare"]: ANY}}
    assert recipe["mean_loss"] == pytest.approx(bare["mean_loss"], rel=1e-5)
    assert recipe["operators"] > bare["operators"] > 100  # the recipe counts, checks and logs
    assert {"torch", "transformers", "deepspeed", "device", "precision"} <= found.keys()


COMPILED = ("trainer_compile", "trainer_fast")  # minutes of g++, a GPU


@pytest.mark.slow
def test_step_of_every_peer_trains_like_the_recipe(tmp_path: Path) -> None:
    peers = [peer for peer in PEERS if peer not in ("bare", *COMPILED)]
    found = _step_figures(tmp_path, "--engine", "none", "zero1", "--peers", *peers)
    losses = [of["mean_loss"] for of in found["loops"].values()]
    assert len(losses) == 2 + len(peers)
    assert max(losses) - min(losses) < 1e-4


@pytest.mark.slow
def test_step_in_bf16_trains_alike_under_deepspeed_and_autocast_and_waits_for_no_number(
    tmp_path: Path,
) -> None:
    engines = ["--engine", "none", "zero1", "zero2"]
    found = _step_figures(tmp_path, *engines, "--precision", "bf16", "--peers", "accelerate")
    waits = {name: of["host_syncs"] for name, of in found["loops"].items()}
    assert waits.pop(STOCK.replace("ZeRO-1", "ZeRO-2")) > 0
    assert waits == {f"recipe, engine {name}": 0 for name in engines[1:]}


def test_numbers_that_a_gpu_would_wait_for_are_counted_and_others_are_not() -> None:
    x, positive = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with Operators() as count:
        x[0] = 1.0
        x[0, 1] = 2
        torch.where(positive, x, -1.0)
        x.where(positive, other=0)
    assert count.synchronisations == {"setitem": 2, "where": 2}
    with Operators() as count:  # kernels take these numbers along, or all is on the device
        x[:1] = 1.0
        x[0] = x[1]
        torch.where(positive, x, x)
        x.masked_fill(positive, -1.0)
    assert not count.synchronisations


def test_ligers_loss_is_no_part_of_the_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        traced.append(torch.compiler.is_compiling())
        return hidden.sum()

    functional = ModuleType("functional")
    functional.liger_fused_linear_cross_entropy = loss  # type: ignore[attr-defined]
    package = ModuleType("transformers")
    package.functional = functional  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    keep_ligers_loss_from_compile()

    def model(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = functional.liger_fused_linear_cross_entropy(x * 2)
        return found

    compiled = torch.compile(model, backend="eager")
    assert compiled(torch.ones(2)) == 4
    assert traced == [False]


def _calls_of_a_step(source: str, function: str) -> list[str]:
    """What the loop over steps in `function` calls, in order, by the names it is called by.

    Ends where the recipe begins with what is done once in a while, ``metrics = {}``.
    """
    (body,) = (
        node.body
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == function
    )
    (loop,) = (node for node in body if isinstance(node, ast.While))
    calls = []
    for statement in loop.body:
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "metrics":
            break
        found = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
        found.sort(key=lambda node: (node.end_lineno, node.end_col_offset))
        calls += [ast.unparse(call.func) for call in found]
    return list(dict.fromkeys(calls))


def test_the_step_that_is_measured_calls_what_the_recipes_step_calls_in_its_order() -> None:
    recipe = (REPOSITORY / "recipes/pretrain.py").read_text(encoding="utf-8")
    loops = (REPOSITORY / "mini_llm/bench/loops.py").read_text(encoding="utf-8")
    # Done at the first step, for spread experts, after a bad step, or a counter on a screen.
    rare = {"profiler", "wire", "held", "log", "write_run_facts", "load_newest", "bad_steps.rewind"}
    rare |= {"saving.wait", "tokens.load_state_dict", "timer.restart", "float", "RuntimeError"}
    asked = [
        call
        for call in _calls_of_a_step(recipe, "main")
        if not {call, call.partition(".")[0]} & rare
    ]
    measured = _calls_of_a_step(loops, "ours")
    assert len(asked) > 20
    assert [call for call in measured if call in asked] == asked


def test_a_peer_that_fails_is_named_and_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # No DeepSpeed config of this name: stock Accelerate's loop ends with an error of its own.
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "/nowhere.json")
    found = _step_figures(tmp_path, "--peers", "accelerate", "bare")
    assert list(found["failed"]) == [STOCK]
    assert list(found["loops"]) == ["recipe, engine none", PEERS["bare"]]
    assert f"{STOCK} failed." in (tmp_path / "table.md").read_text()
    assert f"{STOCK} is left out" in capsys.readouterr().err


def test_loops_that_train_differently_are_not_reported() -> None:
    losses = {"a": {"mean_loss": 4.0}, "b": {"mean_loss": 4.1}}
    with pytest.raises(RuntimeError, match="do not train alike"):
        step._check_losses(losses, tolerance=1e-2)
    step._check_losses(losses, tolerance=3e-2)


def test_a_loop_that_learns_nothing_has_another_loss_than_one_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the size of a preset's vocabulary, in the fewest steps that are measured by default."""
    steps = step.WARMUP_STEPS + 20
    set_seed(0)
    build_model("mini_llama3_tiny", num_hidden_layers=1).save_pretrained(tmp_path / loops.WEIGHTS)
    np.save(tmp_path / loops.TOKENS, step.made_up_rows(32_004, steps, 64))
    job = loops.Job(str(tmp_path), "bare", "none", False, False, 1, 1, steps, "cpu")

    class Steps:
        def __init__(self) -> None:
            self.left = steps

        def start(self) -> None: ...

        def step_done(self) -> bool:
            self.left -= 1
            return self.left > 0

    turns: Any = Steps
    learnt = loops.bare(job, turns())
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    figures = {"a": {"mean_loss": learnt}, "b": {"mean_loss": loops.bare(job, turns())}}
    for tolerance in step.TOLERANCE.values():
        with pytest.raises(RuntimeError, match="do not train alike"):
            step._check_losses(figures, tolerance)


def test_rows_are_as_unequal_as_words_and_within_the_vocabulary() -> None:
    ids = step.made_up_rows(1000, 100, 100)
    assert ids.min() == 0 and ids.max() == 999
    shares = np.bincount(ids.ravel(), minlength=1000) / ids.size
    assert shares[0] == pytest.approx(np.log(2) / np.log(1001), rel=0.1)
    assert shares[:10].mean() > 10 * shares[500:].mean()


def test_a_peer_that_needs_a_gpu_is_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        bench.main([*STEP_FLAGS, "--peers", "trainer_fast"])
    assert capsys.readouterr().err.startswith("--peers: trainer_fast needs a GPU and liger-kernel")


@pytest.mark.parametrize("part", PARTS)
def test_forms_of_each_part_agree_and_their_figures_are_written(part: str, tmp_path: Path) -> None:
    model = {
        "delta_net": "mini_qwen3_next_tiny",
        "optimizer": "mini_llama3_tiny",
        "model": "mini_llama3_tiny",
    }.get(part, "mini_deepseekv3_tiny")
    overrides = {"num_hidden_layers": 2, "vocab_size": 320}
    bench.main(
        [
            *(part, "--model", model, "--model_overrides", json.dumps(overrides)),
            *("--rows", "2", "--seq_len", "64", "--steps", "2", "--device", "cpu"),
            *("--json", str(tmp_path / "figures.json"), "--markdown", str(tmp_path / "table.md")),
        ]
    )
    found = json.loads((tmp_path / "figures.json").read_text())
    assert len(found["forms"]) >= 2 and found["forms"]["ours"]["ours_over_it"] == 1
    for name, of in found["forms"].items():
        assert f"| {name} |" in (tmp_path / "table.md").read_text()
        assert min(of["cpu_seconds"], of["clock_seconds"], of["operators"]) > 0
        assert {"peak_memory_bytes", "host_syncs"} <= of.keys()


def test_a_form_that_takes_no_memory_has_figures_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mini_llm.bench.parts.peak_memory", lambda *_: 0)
    small = json.dumps({"num_hidden_layers": 1, "vocab_size": 64})
    flags = ["--model", "mini_llama3_tiny", "--model_overrides", small, "--steps", "1"]
    table = tmp_path / "table.md"
    bench.main(["optimizer", *flags, "--device", "cpu", "--markdown", str(table)])
    assert table.read_text().count("| 0.0 | – |") == 2


def test_multi_token_prediction_is_left_out_beside_what_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"num_hidden_layers": 2, "vocab_size": 64}
    size = [*("--rows", "1", "--seq_len", "16", "--steps", "2", "--device", "cpu")]
    model = ["model", "--model", "mini_deepseekv3_tiny", *size]
    bench.main(
        [*model, "--model_overrides", json.dumps(small), "--json", str(tmp_path / "figures.json")]
    )
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["overrides"] == {**small, "num_nextn_predict_layers": 0}
    assert found["forms"].keys() > {"ours", "stock class, experts eager"}
    with_it = json.dumps({**small, "num_nextn_predict_layers": 1})
    step = ["step", "--model", "mini_deepseekv3_tiny", *size, "--peers", "bare"]
    for command in (model, step):
        with pytest.raises(SystemExit):
            bench.main([*command, "--model_overrides", with_it])
        assert capsys.readouterr().err.startswith(
            "--model_overrides: num_nextn_predict_layers must be 0, because "
        )


def test_all_writes_the_figures_of_each_of_its_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = bench.all_commands("cpu", 2)
    kinds = [command[0] for command in commands]
    assert {*PARTS, "step", "recipes", "checkpoint", "generation", "attention", "traffic"} == set(
        kinds
    )
    on_a_gpu = bench.all_commands("cuda", 20)
    for command in [*commands, *on_a_gpu]:
        bench.build_parser().parse_args(command)  # SystemExit if it were mistyped
    for command in on_a_gpu:
        args = bench.build_parser().parse_args(command)
        assert args.what == "traffic" or args.device == "cuda"
        if args.what in ("step", "recipes"):
            assert args.rows * args.micro_batches * args.seq_len == 65_536
            assert args.what == "recipes" or {"trainer", "trainer_compile"} < set(args.peers)
    sound = ["traffic", "--gpus", "8"]
    failing = ["moe", "--model", "mini_llama3_tiny", "--device", "cpu"]
    monkeypatch.setattr(bench, "all_commands", lambda *_: [sound])
    figures, table = tmp_path / "figures.json", tmp_path / "tables.md"
    everything = ["all", "--device", "cpu", "--json", str(figures), "--markdown", str(table)]
    bench.main(everything)
    line = "python -m mini_llm.bench traffic --gpus 8"
    written = json.loads(figures.read_text())
    assert list(written) == [line]
    assert table.read_text().startswith(f"`{line}`\n\n| model, engine | 8 GPUs |")

    # One that fails is named, and costs the others nothing.
    monkeypatch.setattr(bench, "all_commands", lambda *_: [failing, sound])
    bench.main([*everything, "--only", "traffic"])
    assert json.loads(figures.read_text()) == written
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        bench.main(everything)
    assert end.value.code == 1
    why = "--model: mini_llama3_tiny has no routed experts; give another preset"
    failed = " ".join(["python -m mini_llm.bench", *failing])
    assert json.loads(figures.read_text()) == {failed: {"failed": why}, **written}
    assert capsys.readouterr().err == f"failed: {why}\n\nfailed:\n{failed}\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optimizer", "--steps", "0"], "--steps is 0; it must be at least 1"),
        (["traffic", "--gpus", "8", "0"], "--gpus is 0; it must be at least 1"),
        (["traffic", "--json", "no/where.json"], "--json no/where.json: give a file in a folder"),
        (["traffic", "--markdown", "."], "--markdown .: give a file in a folder that exists"),
        (["all", "--input", "no/such/folder"], "--input: no/such/folder does not exist"),
        (["all", "--only", "data"], "--only data: give --input, the text to measure it on"),
        (["traffic", "--json", "/proc/x.json"], "--json /proc/x.json cannot be written ("),
        (["traffic", "--json", "x", "--markdown", "./x"], "--json and --markdown are both x; give"),
        (["step", "--seq_len", "1"], "--seq_len is 1; one token has no next one to predict"),
        (["step", "--model", "nope"], "--model: no preset is named 'nope'; choose one of"),
        (["generation", "--model", "mini_llama3", "nope"], "--model: no preset is named 'nope'"),
        (
            ["loss", "--model", "mini_llama3", "--model_overrides", '{"num_attention_heads": 0}'],
            "--model_overrides: a size cannot be 0",
        ),
        (["recipes", "--model_overrides", '{"vocab_size": 9}'], "--model_overrides: vocab_size is"),
        (["step", "--engine", "none", "zero0", "--precision", "bf16"], "--engine zero0 with --pre"),
        (["checkpoint", "--engine", "zero0", "--precision", "bf16"], "--engine zero0 with --preci"),
        *(
            []
            if torch.cuda.is_available()
            else [
                ([part, "--device", "cuda"], "--device: cuda cannot be used here")
                for part in ("step", "attention", "checkpoint")
            ]
        ),
    ],
)
def test_what_would_fail_after_measuring_is_refused_before(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        bench.main(words)
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "") and said.err.startswith(sentence)


@pytest.mark.slow
def test_checkpoint_figures_are_of_saves_between_steps(tmp_path: Path) -> None:
    overrides = json.dumps({"num_hidden_layers": 1, "hidden_size": 64, "head_dim": 16})
    command = [
        *(sys.executable, "-m", "mini_llm.bench", "checkpoint", "--model", "mini_llama3_tiny"),
        *("--model_overrides", overrides, "--rows", "1", "--seq_len", "16", "--steps", "2"),
        *("--json", str(tmp_path / "figures.json")),
    ]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=300)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["engine"] == "DeepSpeed ZeRO-1 on 1 rank(s)"
    assert found["complete_seconds"] > found["wait_seconds"] > 0
    assert min(found["step_seconds"], found["step_during_seconds"]) > 0
    # Weights of 32,004 × 64 and more, as they are and as master weights with two moments.
    assert found["checkpoint_bytes"] > 4 * 4 * 32_004 * 64


def test_generation_figures_compare_the_generator_with_generate_of_both_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "mini_llama3_tiny", "--batch", "2", "--prompt_tokens", "8"]
    flags += ["--new_tokens", "4", "--repeats", "1", "--json", str(tmp_path / "figures.json")]
    flags += ["--markdown", str(tmp_path / "table.md")]
    bench.main(["generation", *flags])
    figures = json.loads((tmp_path / "figures.json").read_text())["mini_llama3_tiny batch 2"]
    ratio = figures["generator_tokens_per_second"] / figures["stock_tokens_per_second"]
    assert figures["stock_over_generator"] == pytest.approx(ratio)
    assert "mini_llama3_tiny, batch 2: generate " in capsys.readouterr().out
    assert "| mini_llama3_tiny batch 2 |" in (tmp_path / "table.md").read_text()
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


def test_all_fails_where_a_launch_of_the_recipes_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "all_commands", lambda *_: [["recipes", "--without_sft"]])
    monkeypatch.setattr(bench, "measure", lambda args: ({"failed": {"x, engine zero2": ""}}, ""))
    with pytest.raises(SystemExit) as end:
        bench.main(["all", "--device", "cpu"])
    assert end.value.code == 1
