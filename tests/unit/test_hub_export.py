"""What leaves the project: a chat model's folder, and its card."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mini_llm import build_model
from mini_llm.data.conversations import ChatEncoder
from mini_llm.data.tokenizer import load_tokenizer
from mini_llm.hub.export import base_generation_config, chat_generation_config, save_final
from mini_llm.hub.model_card import from_hub, write_card
from mini_llm.training.arguments import PretrainArguments, RunArguments, SftArguments
from mini_llm.training.run_folder import write_config
from mini_llm.training.samples import Answer, format_answers
from mini_llm.training.sizes import ParameterCounts, count_parameters
from tests.unit.prepare_fixtures import make_tokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "训练 what?"}]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("export") / "tokenizer")


def write_run(folder: Path, args: RunArguments, parameters: ParameterCounts) -> None:
    """run.json and metrics.jsonl as far as a card reads them."""
    facts = {
        "recipe": "sft" if isinstance(args, SftArguments) else "pretrain",
        "from_hub": from_hub(args),
        "parameters": dataclasses.asdict(parameters),
        "world_size": 2,
        "distributed_type": "DEEPSPEED",
        "zero_stage": 1,
        "device": "cpu",
        "expert_parallel_size": 1,
        "versions": {"torch": "1", "transformers": "2"},
    }
    (folder / "run.json").write_text(json.dumps(facts))
    evaluation = {"eval/a/loss": 1.5, "eval/a/bits_per_byte": 0.5}
    line = {"step": 3, "train/loss": 2.0, "train/tokens": 99, "data/a/tokens": 99, **evaluation}
    (folder / "metrics.jsonl").write_text(f"{json.dumps(line)}\n")


def export(tokenizer_dir: Path, folder: Path, *, fine_tuned: bool) -> Path:
    """``final/`` of a tiny model and its card, as a recipe writes them."""
    tokenizer: Any = load_tokenizer(tokenizer_dir)
    accelerator = Accelerator(cpu=True)
    model = build_model("mini_llama3_tiny", vocab_size=len(tokenizer), num_hidden_layers=1)
    config = chat_generation_config if fine_tuned else base_generation_config
    model.generation_config = config(tokenizer)
    cls = SftArguments if fine_tuned else PretrainArguments
    args = cls(
        output_dir=str(folder),
        model="runs/base/final" if fine_tuned else "mini_llama3_tiny",
        tokenizer=str(tokenizer_dir),
        max_steps=3,
        data={"a": {"path": "p", "weight": 2}},
    )
    write_config(folder, args)
    write_run(folder, args, count_parameters(model))
    save_final(accelerator, model, tokenizer, folder / "final")
    return folder / "final"


def test_plain_transformers_reads_the_chat_template_and_both_end_tokens(tokenizer_dir, tmp_path):
    final = export(tokenizer_dir, tmp_path, fine_tuned=True)
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = AutoModelForCausalLM.from_pretrained(final)
    im_end, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == [im_end, end_of_text]
    assert GenerationConfig.from_pretrained(final).eos_token_id == [im_end, end_of_text]
    assert (final / "chat_template.jinja").is_file()
    # The rendered prompt is what training saw before the answer.
    asked = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answer = {"role": "assistant", "content": "x"}
    trained_on = ChatEncoder(tokenizer_dir).encode([*MESSAGES, answer]).input_ids
    length = asked["input_ids"].shape[1]
    assert asked["input_ids"][0].tolist() == trained_on[:length].tolist()
    # generate ends a sequence at either of them: force one after two tokens.
    for end in (im_end, end_of_text):
        output = model.generate(
            **asked,
            max_new_tokens=9,
            logits_processor=[
                lambda ids, scores, end=end: scores.index_fill(
                    1, ids.new_tensor([end if ids.shape[1] == length + 2 else 5]), 1e9
                )
            ],
        )
        assert output[0, length:].tolist() == [5, 5, end]


def test_a_tokenizer_without_the_end_of_a_turn_is_refused():
    tokenizer = SimpleNamespace(get_vocab=lambda: {"<|endoftext|>": 0}, name_or_path="some/folder")
    with pytest.raises(ValueError, match=r"^--tokenizer: some/folder has no <\|im_end\|> token"):
        chat_generation_config(tokenizer)


def test_card_says_where_a_model_comes_from_and_how_to_chat_with_it(
    tokenizer_dir, tmp_path, capsys, monkeypatch
):
    final = export(tokenizer_dir, tmp_path, fine_tuned=True)
    card = (final / "README.md").read_text()
    assert "A chat model (LlamaForCausalLM) of " in card
    assert (
        "fine-tuned from `base/final` with mini-llm for 3 steps." in card
        and "pretrained" not in (card.replace("from_pretrained", ""))
    )
    assert "| a | 1.5000 | 0.5000 |" in card
    # Its example runs as it stands, in that folder's place.
    example = (
        card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(final))
    )
    exec(example.replace("max_new_tokens=256", "max_new_tokens=4"), {})
    assert capsys.readouterr().out.endswith("\n")

    base = (export(tokenizer_dir, tmp_path / "base", fine_tuned=False) / "README.md").read_text()
    assert (
        "A `mini_llama3_tiny` (LlamaForCausalLM) of " in base
        and "pretrained with mini-llm for 3 steps" in base
    )
    assert "apply_chat_template" not in base and "fine-tuned" not in base


def test_card_names_hub_ids_and_no_local_path_that_looks_like_one(
    tokenizer_dir, tmp_path, monkeypatch
):
    final = export(tokenizer_dir, tmp_path, fine_tuned=True)
    monkeypatch.chdir(tmp_path)
    Path("data/packed").mkdir(parents=True)
    Path("output/base").mkdir(parents=True)
    data = {"local": {"path": "data/packed"}, "hub": {"path": "owner/chats"}}
    data["files"] = {"path": ["hf://datasets/owner/books@main/a.parquet", "https://x.org/b/c"]}
    for model, base in (("owner/base", "owner/base"), ("output/base", None)):
        args = SftArguments(output_dir=str(tmp_path), model=model, data=data)
        write_config(tmp_path, args)
        write_run(tmp_path, args, ParameterCounts(10, 10, 0, 0, 0))
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir("/")
            write_card(final, tmp_path)
        metadata = yaml.safe_load((final / "README.md").read_text().split("---\n")[1])
        assert metadata["datasets"] == ["owner/books", "owner/chats"]
        assert metadata.get("base_model") == base
        assert metadata["license"] == "unknown" and "language" not in metadata


def test_a_chat_card_shows_the_answers_of_the_last_evaluation_up_to_its_step(
    tokenizer_dir, tmp_path
):
    final = export(tokenizer_dir, tmp_path, fine_tuned=True)
    answers = [Answer(step, "user: hi", f"at {step}\n=== step 9", True, 2) for step in (1, 2, 3)]
    (tmp_path / "samples.txt").write_text(format_answers(answers))
    for step, shown in ((None, 3), (2, 2)):
        write_card(final, tmp_path, step=step)
        samples = (final / "README.md").read_text().split("## Samples")[1]
        assert [number for number in (1, 2, 3) if f"at {number}" in samples] == [shown]
