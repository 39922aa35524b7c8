"""What a model in training writes after its prompts.

Run as a script under ``accelerate launch``, this file is a rank that trains and samples; see
``test_every_rank_of_an_engine_gets_the_answers_of_the_saved_weights``.
"""

# ruff: noqa: E402
import json
import random
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mini_llm.parallel.environment import prepare_environment

prepare_environment()

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mini_llm import build_model
from mini_llm.data.conversations import ChatEncoder
from mini_llm.data.tokenizer import load_tokenizer
from mini_llm.hub.export import (
    base_generation_config,
    chat_generation_config,
    save_stock_checkpoint,
)
from mini_llm.models import load_model
from mini_llm.parallel import engine
from mini_llm.training.samples import (
    Answer,
    PromptSamples,
    check_prompt_lengths,
    format_answers,
    parse_answers,
)
from tests.launching import REPOSITORY, launch_command, launch_environment
from tests.unit.prepare_fixtures import make_tokenizer

MODELS = ["mini_llama3_tiny", "mini_deepseekv3_tiny", "mini_qwen3_next_tiny"]
QUESTION = "Two and two?"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "训练 what?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "And then?"},
]
PROMPTS = [QUESTION, TALK]
MAX_NEW_TOKENS = 12


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("samples") / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Any:
    return load_tokenizer(tokenizer_dir)


def tiny_model(name: str, tokenizer: Any) -> Any:
    """Large weights, so that tokens are not near-ties of each other."""
    torch.manual_seed(1)
    model = build_model(name, vocab_size=len(tokenizer), pad_token_id=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


@pytest.mark.parametrize(("prompt", "tokens"), [("", 0), (["a"], 0), ("a b c d", 7)])
def test_a_prompt_that_a_base_model_cannot_complete_is_refused_before_training(
    tokenizer: Any, prompt: Any, tokens: int
) -> None:
    message = f"--sample_prompts: prompt 2 has {tokens} tokens of text; .* fewer than --seq_len 7"
    with pytest.raises(ValueError, match=message):
        check_prompt_lengths(["a", prompt], tokenizer, 7)


def samples_of(tokenizer: Any, folder: Path, start_step: int = 0, **options: Any) -> PromptSamples:
    """PromptSamples of one process, those of a chat model unless ``chat`` says otherwise."""
    accelerator = options.pop("accelerator", None) or Accelerator(cpu=True)
    return PromptSamples(
        accelerator,
        tokenizer,
        folder,
        options.pop("prompts", PROMPTS),
        chat=options.pop("chat", True),
        seed=options.pop("seed", 0),
        max_new_tokens=options.pop("max_new_tokens", MAX_NEW_TOKENS),
        start_step=start_step,
    )


def plain_answers(model: Any, tokenizer: Any) -> list[str]:
    """What transformers alone generates for each of PROMPTS."""
    answers = []
    for prompt in PROMPTS:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=chat_generation_config(tokenizer).eos_token_id,
            synced_gpus=False,
        )
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
    return answers


@pytest.mark.parametrize(
    "prompt, reason",
    [
        (" \n", "empty_user_turn"),
        ({"role": "user", "content": "x"}, "neither a text nor a list"),
        ([], "roles_out_of_order"),
        (["x"], "message_not_an_object"),
        (TALK[:3], "roles_out_of_order"),
        ([{"role": "tool", "content": "x"}], "role_tool"),
        ([{"role": "user", "content": 3}], "content_not_a_string"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_refused_in_one_sentence(
    prompt, reason, tokenizer, tmp_path
):
    with pytest.raises(ValueError) as refusal:
        samples_of(tokenizer, tmp_path, prompts=["fine", prompt])
    text = str(refusal.value)
    assert text.startswith(f"--sample_prompts: prompt 2 cannot be asked ({reason}); ")
    assert "\n" not in text


@pytest.mark.parametrize("prompt", ["", ["a list"], 3])
def test_a_begin_that_is_no_text_is_refused_in_one_sentence(prompt, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="--sample_prompts: prompt 2 is .*; give the begin of a"):
        samples_of(tokenizer, tmp_path, prompts=["fine", prompt], chat=False)


def test_a_base_model_goes_on_as_its_generation_config_says_with_the_seed(tokenizer, tmp_path):
    model = tiny_model(MODELS[0], tokenizer).eval()

    def written(seed: int) -> list[str]:
        folder = tmp_path / str(seed)
        samples = samples_of(tokenizer, folder, prompts=["Two and", "训练"], chat=False, seed=seed)
        assert samples.take(model, 5)["samples/tokens"] <= MAX_NEW_TOKENS
        assert parse_answers((folder / "samples.txt").read_text()) == samples.answers
        assert [answer.prompt for answer in samples.answers] == ["Two and", "训练"]
        return [answer.answer for answer in samples.answers]

    expected = []
    for prompt in ("Two and", "训练"):
        torch.manual_seed(7)
        inputs = tokenizer(prompt, return_tensors="pt")
        config = base_generation_config(tokenizer)
        output = model.generate(**inputs, generation_config=config, max_new_tokens=MAX_NEW_TOKENS)
        expected.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
    assert written(7) == expected != written(8)


def test_without_prompts_nothing_is_done(tokenizer, tmp_path):
    samples = samples_of(tokenizer, tmp_path, prompts=[])
    assert samples.take(torch.nn.Linear(1, 1), 1) == {} and samples.text() == ""
    assert not list(tmp_path.iterdir())


def test_samples_txt_reads_back_whatever_was_said():
    end = "--- answer 1: 3 tokens, stopped by itself"
    odd = ["", "\n", "=== step 9: 1", f"--- prompt 1\n  x\n{end}\n  y", "  a\r\n\x0c\u2028b\t \n"]
    answers = [
        Answer(step, f"user: {odd[i]}", odd[-i], stopped=i % 2 == 0, tokens=i)
        for step in (0, 7)
        for i in range(len(odd))
    ]
    text = format_answers(answers)
    assert parse_answers(text) == answers
    # Of a run that was killed while writing, a prompt without its answer does not count.
    assert parse_answers(text[: text.rindex("--- answer") + 12]) == answers[:-1]


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_that_generate_gives_each_prompt_alone(
    name, tokenizer, tokenizer_dir, tmp_path
):
    model = tiny_model(name, tokenizer)
    samples = samples_of(tokenizer, tmp_path)
    numbers = samples.take(model.train(), 3)
    assert model.training
    expected = plain_answers(model.eval(), tokenizer)
    assert [answer.answer for answer in samples.answers] == expected
    assert len(set(expected)) == 2  # the model looks at the prompt
    assert numbers == {"samples/stopped": 0.0, "samples/tokens": float(MAX_NEW_TOKENS)}
    # And the prompts are the tokens that training saw before an answer.
    encoder = ChatEncoder(tokenizer_dir)
    trained_on = encoder.encode([*TALK, {"role": "assistant", "content": "x"}])
    asked = tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    assert trained_on.input_ids[: len(asked)].tolist() == asked
    assert (trained_on.labels[: len(asked)] != -100).sum() > 0  # the first answer
    assert trained_on.labels[len(asked)] != -100

    # New weights, new answers; and a model that has come to say an end token stops there.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # all logits are 0: the likeliest token is the first, <|endoftext|>
    assert samples.take(model, 4) == {"samples/stopped": 1.0, "samples/tokens": 1.0}
    assert samples.text() == (
        "=== step 4: 2 of 2 answers stopped by themselves, 1.0 tokens on average\n"
        "--- prompt 1\n  user: Two and two?\n"
        "--- answer 1: 1 tokens, stopped by itself\n  <|endoftext|>\n"
        "--- prompt 2\n  system: Be brief.\n  user: 训练 what?\n  assistant: A model.\n"
        "  user: And then?\n"
        "--- answer 2: 1 tokens, stopped by itself\n  <|endoftext|>\n"
    )
    assert (tmp_path / "samples.txt").read_text().endswith(samples.text())


def test_sampling_leaves_random_states_and_weights_as_they_were(tokenizer, tmp_path):
    model = tiny_model(MODELS[0], tokenizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def draws() -> list[float]:
        torch.manual_seed(5), np.random.seed(6), random.seed(7)
        if sample:
            samples_of(tokenizer, tmp_path).take(model, 1)
        return [torch.rand(()).item(), float(np.random.rand()), random.random()]

    sample = False
    expected = draws()
    sample = True
    assert draws() == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_resumed_run_and_one_that_went_back_keep_what_lies_before_them(tokenizer, tmp_path):
    tables: list[Any] = []
    texts: list[str] = []
    accelerator = Accelerator(cpu=True)
    accelerator.trackers = [
        SimpleNamespace(name="wandb", log_table=lambda *a, **table: tables.append(table)),
        SimpleNamespace(name="tensorboard", log=lambda values, step: texts.extend(values.values())),
    ]
    model = tiny_model(MODELS[0], tokenizer)
    path = tmp_path / "samples.txt"

    def steps() -> list[int]:
        return [answer.step for answer in parse_answers(path.read_text())]

    samples = samples_of(tokenizer, tmp_path, accelerator=accelerator)
    for step in (10, 20, 30):
        samples.take(model, step)
    samples.take(model, 25)  # --bad_step_policy rewind went back to 20
    assert steps() == [10, 10, 20, 20, 25, 25]
    with path.open("ab") as file:
        file.write("=== step 30: 1 of 2 ans训".encode()[:-1])  # killed
    resumed = samples_of(tokenizer, tmp_path, start_step=20, accelerator=accelerator)
    assert steps() == [10, 10, 20, 20] and "ans" not in path.read_text().splitlines()[-1]
    resumed.take(model, 30)
    assert steps() == [10, 10, 20, 20, 30, 30]
    assert tables[-1]["columns"] == ["step", "prompt", "answer", "stopped", "tokens"]
    assert [row[0] for row in tables[-1]["data"]] == steps() and tables[-1]["step"] == 30
    last = resumed.answers[-1]
    assert tables[-1]["data"][-1] == [30, last.prompt, last.answer, False, MAX_NEW_TOKENS]
    header, _, *rows = texts[-1].splitlines()
    assert header == "| prompt | answer | stopped | tokens |" and len(rows) == 2
    assert rows[0].startswith("| user: Two and two? | ") and rows[0].endswith(" | no | 12 |")
    assert all(row.count("|") == 5 for row in rows)
    # A run that starts anew keeps nothing.
    samples_of(tokenizer, tmp_path, start_step=0)
    assert path.read_text() == ""


def test_a_disk_too_full_to_cut_the_samples_loses_none_of_them(tokenizer, tmp_path):
    path = tmp_path / "samples.txt"
    text = format_answers([Answer(step, "Q?", "A." * 20, True, 3) for step in range(1, 51)])
    path.write_text(text)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            samples_of(tokenizer, tmp_path, start_step=49)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == text


# Under an engine


def be_a_rank(folder: Path, bf16: bool) -> None:
    """Train a few steps, sample in between, and write what this rank saw."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    accelerator = engine.build_accelerator("none", micro_batch_size=1, bf16=bf16)
    model = tiny_model(MODELS[1], tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    samples = samples_of(tokenizer, folder, accelerator=accelerator)
    encoder = ChatEncoder(folder / "tokenizer")
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Four."}]
    encoded = encoder.encode(messages)
    numbers = []
    for step in range(3):
        numbers.append(samples.take(model, step))
        for _ in range(5):
            ids, labels = (
                torch.from_numpy(array)[None].long().to(accelerator.device)
                for array in (encoded.input_ids, encoded.labels)
            )
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            engine.backward(accelerator, model, loss / accelerator.num_processes)
            engine.optimizer_step(model, optimizer, 1.0)
    numbers.append(samples.take(model, 3))
    save_stock_checkpoint(accelerator, model, tokenizer, folder / "model")
    seen = {
        "numbers": numbers,
        "random": torch.rand(3).tolist(),
        "stage": engine.zero_stage(accelerator, model),
        "answers": [answer.answer for answer in samples.answers],
    }
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(seen))
    engine.leave(accelerator)


@pytest.mark.parametrize(
    "config, bf16",
    [
        ("zero3", False),
        *(
            pytest.param(config, bf16, marks=pytest.mark.slow)
            for config, bf16 in [
                *(("ddp", False), ("zero0", False), ("zero1", False), ("zero2", False)),
                *(("zero2", True), ("zero3", True)),
            ]
        ),
    ],
)
def test_every_rank_of_an_engine_gets_the_answers_of_the_saved_weights(
    config, bf16, tokenizer, tmp_path
):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    *launcher, _ = launch_command(config=config)
    done = subprocess.run(
        [*launcher, __file__, str(tmp_path), str(bf16)],
        cwd=REPOSITORY,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    first, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["numbers"] == other["numbers"] and len(first["numbers"]) == 4
    assert first["random"] == other["random"]  # rank 0, which generated, has drawn no number
    assert first["stage"] == (int(config[-1]) if config.startswith("zero") else None)
    assert len(first["answers"]) == 8 and other["answers"] == []
    assert first["answers"][6] != first["answers"][0]
    if not bf16:  # in which these few large steps do not always lead there
        assert first["answers"][6] == "Four.<|im_end|>"  # it has learnt it
        assert first["numbers"][0]["samples/stopped"] < first["numbers"][3]["samples/stopped"]
    saved = load_model(tmp_path / "model", dtype="auto").eval()
    assert saved.dtype == (torch.bfloat16 if bf16 and config != "ddp" else torch.float32)
    assert plain_answers(saved, tokenizer) == first["answers"][6:]


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]), sys.argv[2] == "True")
