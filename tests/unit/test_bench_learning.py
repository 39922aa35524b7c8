"""python -m mini_llm.bench learning: that both sides get the same, and that its verdicts follow."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_llm.bench import __main__ as bench
from mini_llm.bench import learning
from mini_llm.bench.learning import (
    DENSE,
    MIXTURE,
    Training,
    active_size,
    is_better,
    is_no_worse,
    loops,
    markdown,
    paired_difference,
    recipe_flags,
    same_active_size,
)
from mini_llm.bench.learning_peer import CONFIG, PeerTrainer, build_trainer
from mini_llm.bench.names import TINY_PRESETS
from mini_llm.data import collate, open_stream
from mini_llm.models import build_model
from mini_llm.training.arguments import PretrainArguments, parse_arguments
from mini_llm.training.optimizer import build_optimizer, learning_rate_at
from tests.conftest import TinyData


def _arguments(tiny_data: TinyData, folder: Path, *flags: str) -> PretrainArguments:
    own = ["--output_dir", str(folder), "--max_steps", "3", "--warmup_steps", "1"]
    own += ["--global_batch_tokens", "512", "--per_device_train_batch_size", "4"]
    return parse_arguments(PretrainArguments, CONFIG, [*own, *tiny_data.flags, *flags])


def test_dense_model_has_the_active_size_of_the_mixture_within_two_percent() -> None:
    overrides, sizes = same_active_size(MIXTURE, DENSE)
    mixture, dense = sizes[MIXTURE], sizes[DENSE]
    assert dense["active_without_embedding"] == pytest.approx(
        mixture["active_without_embedding"], rel=0.02
    )
    assert mixture["total_without_embedding"] > 2 * mixture["active_without_embedding"]
    # Counted apart: all weights of our class but the embedding, which is the head too.
    model = build_model(DENSE, **overrides)
    counted = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    assert (
        counted
        == dense["active_without_embedding"]
        == active_size(DENSE, **overrides)["total_without_embedding"]
    )


def test_a_size_that_no_override_reaches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "SHORTEST_STEP", 320)
    with pytest.raises(ValueError, match="has no intermediate_size"):
        same_active_size(MIXTURE, DENSE)


def test_worse_and_better_begin_more_than_one_standard_error_away() -> None:
    # Differences 1, 2 and 3: mean 2, standard deviation 1, standard error 1 / √3.
    above = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert above["by_seed"] == [1, 2, 3] and above["mean"] == 2
    assert above["standard_error"] == pytest.approx(3**-0.5)
    assert is_no_worse(above) is False and is_better(above) is False
    below = paired_difference([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert is_no_worse(below) is True and is_better(below) is True
    for mean in (0.5, -0.5):  # within one: no worse, and no better either
        within = {"mean": mean, "standard_error": 0.5}
        assert is_no_worse(within) is True and is_better(within) is False
    alone = paired_difference([1.0], [2.0])
    assert alone["standard_error"] is is_no_worse(alone) is is_better(alone) is None


def _result(loss: float) -> dict[str, Any]:
    return {"loss": loss, "first_training_loss": 8.3}


def test_a_bar_that_fails_stands_in_the_table() -> None:
    worse = paired_difference([3.0, 3.1], [2.0, 2.0])
    of_model = {"recipe": [_result(3.0), _result(3.1)], "trainer": [_result(2.0)] * 2}
    _, sizes = same_active_size(MIXTURE, DENSE)
    found: dict[str, Any] = {"steps": 3, "seq_len": 256, "seeds": [0, 1], "learning_rate": 1e-3}
    found |= {"warmup_steps": 1, "min_lr_ratio": 0.1, "weight_decay": 0.1}
    found |= {"vocabulary": 4096, "held_out_tokens": 1000}
    same = paired_difference([2.0, 2.1], [2.0, 2.0])
    found["models"] = {
        MIXTURE: {
            **of_model,
            "recipe_without_mtp": [_result(2.0), _result(2.1)],
            "differences": {"recipe": worse, "recipe_without_mtp": same},
            "no_worse": {"recipe": is_no_worse(worse), "recipe_without_mtp": is_no_worse(same)},
        }
    }
    found["same_active_size"] = {
        "overrides": {"intermediate_size": 208},
        "sizes": sizes,
        MIXTURE: of_model["recipe"],
        DENSE: of_model["trainer"],
        "difference": worse,
        "better": is_better(worse),
    }
    table = markdown(found)
    row = f"| {MIXTURE} | 3.0000, 3.1000 | 2.0000, 2.0000 | +1.0500 ± 0.0500 | **worse** |"
    assert row in table and "+1.0500 ± 0.0500: **not better**" in table
    row = f"| {MIXTURE}, multi-token prediction at weight 0 | 2.0000, 2.1000 | 2.0000, 2.0000 | "
    assert row + "+0.0500 ± 0.0500 | no worse |" in table


@pytest.mark.parametrize("model", TINY_PRESETS)
def test_both_sides_let_the_same_parameters_decay(
    model: str, tiny_data: TinyData, tmp_path: Path
) -> None:
    trainer = build_trainer(_arguments(tiny_data, tmp_path, "--model", model))
    theirs = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    ours_model = build_model(model)
    ours = build_optimizer(
        ours_model, learning_rate=1.0, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8
    )
    our_names = {id(p): name for name, p in ours_model.named_parameters()}

    def decaying(optimizer: Any, names: dict[int, str], decays: bool) -> set[str]:
        groups = [g for g in optimizer.param_groups if (g["weight_decay"] > 0) == decays]
        return {names[id(p)] for group in groups for p in group["params"]}

    for decays in (True, False):
        found = decaying(theirs, names, decays)
        # Only ours has layers of multi-token prediction, behind the others.
        expected = {name for name in decaying(ours, our_names, decays) if name in names.values()}
        assert found == expected and len(found) > 8
    assert {group["betas"] for group in theirs.param_groups} == {(0.9, 0.95)}
    assert {group["eps"] for group in theirs.param_groups} == {1e-8}


def test_only_the_delta_nets_decay_rates_would_decay_by_trainers_own_names(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    trainer = build_trainer(_arguments(tiny_data, tmp_path, "--model", "mini_qwen3_next_tiny"))
    its_own = set(super(PeerTrainer, trainer).get_decay_parameter_names(trainer.model))
    taken_out = its_own - set(trainer.get_decay_parameter_names(trainer.model))
    parameters = dict(trainer.model.named_parameters())
    assert {name.split(".")[-1] for name in taken_out if name in parameters} == {"A_log"}


def test_trainer_gets_the_rows_and_learning_rates_of_the_recipe_in_its_order(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    flags = ["--model", "mini_llama3_tiny", "--seed", "1"]
    args = _arguments(tiny_data, tmp_path, *flags)
    trainer = build_trainer(args)
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 6  # micro-batches of four rows, two of them a step
    with open_stream(
        args.data, seq_len=64, seed=1, rows_per_step=8, tokenizer=args.tokenizer
    ) as stream:
        for batch in batches:
            expected: Any = collate([next(stream) for _ in range(4)])
            assert set(batch) == {"input_ids", "position_ids", "labels"}
            for name, tensor in batch.items():
                assert torch.equal(tensor, expected[name]), name
    assert (batches[0]["position_ids"][:, 1:] == 0).any()  # packed: documents begin inside a row
    other = build_trainer(_arguments(tiny_data, tmp_path, *flags[:2], "--seed", "2"))
    assert not torch.equal(other.train_dataset[0]["input_ids"], batches[0]["input_ids"][0])

    trainer.create_optimizer_and_scheduler(num_training_steps=3)
    rates = []
    for _ in range(3):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx(
        [
            learning_rate_at(step, peak=4e-3, max_steps=3, warmup_steps=1, min_lr_ratio=0.02)
            for step in (1, 2, 3)
        ]
    )


@pytest.mark.parametrize("model", TINY_PRESETS)
def test_stock_class_keeps_packed_documents_apart_but_in_delta_nets(
    model: str, tiny_data: TinyData, tmp_path: Path
) -> None:
    trainer = build_trainer(_arguments(tiny_data, tmp_path, "--model", model))
    stock: Any = trainer.model.eval()
    assert stock.config.use_cache is False  # with a cache, transformers looks for no documents
    ids = torch.arange(1, 33)[None]
    positions = torch.cat((torch.arange(16), torch.arange(16)))[None]
    changed = ids.clone()
    changed[0, 15] = 99  # the last token of the first document
    with torch.no_grad():
        one, two = (
            stock(input_ids=text, position_ids=positions).logits[0, 16:] for text in (ids, changed)
        )
    largest = float((one - two).abs().max())
    # Experts multiply all their tokens at once, so other neighbours may round otherwise.
    assert largest > 1e-3 if model == "mini_qwen3_next_tiny" else largest < 1e-6


def test_flags_are_the_quickstarts_and_what_the_models_own_config_says_of_experts() -> None:
    by_model = {}
    for model in TINY_PRESETS:
        flags = recipe_flags(Training("recipe", model, "{}", 7), Path("somewhere"), 300)
        by_model[model] = parse_arguments(PretrainArguments, CONFIG, flags)
    for args in by_model.values():
        assert (args.seed, args.max_steps, args.warmup, args.learning_rate) == (7, 300, 30, 4e-3)
        assert args.global_batch_tokens == 2048 and args.gradient_accumulation_steps(1) == 1
        assert args.bf16 is False
    assert by_model["mini_qwen3_next_tiny"].balance_loss_weight == 0.01
    mixture = by_model[MIXTURE]
    assert (mixture.balance_loss_weight, mixture.expert_bias_update_speed) == (1e-4, 1e-3)
    assert (mixture.mtp_loss_weight, mixture.mtp_loss_final_weight) == (0.3, 0.1)


def test_a_model_with_multi_token_prediction_is_also_trained_without_and_by_nothing_else() -> None:
    assert {model: loops(model) for model in TINY_PRESETS if model != MIXTURE} == {
        model: ("recipe", "trainer") for model in TINY_PRESETS if model != MIXTURE
    }
    assert loops(MIXTURE) == ("recipe", "recipe_without_mtp", "trainer")
    one, other = (
        recipe_flags(Training(by, MIXTURE, "{}", 7), Path("somewhere"), 300)
        for by in ("recipe", "recipe_without_mtp")
    )
    args, without = (parse_arguments(PretrainArguments, CONFIG, flags) for flags in (one, other))
    same_place = replace(without, output_dir=args.output_dir)
    assert (without.mtp_loss_weight, without.mtp_loss_final_weight) == (0.0, 0.0)
    assert replace(same_place, mtp_loss_weight=0.3, mtp_loss_final_weight=0.1) == args


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps", "0"], "--steps is 0; it must be at least 1\n"),
        (["--seeds", "1", "1"], "--seeds 1 1: give each once, none below 0\n"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_sentence(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(["learning", *flags])
    assert capsys.readouterr().err == sentence


@pytest.mark.slow
def test_the_whole_command_trains_both_alike_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mini_llm.data.quickstart.MAX_BYTES", 500_000)
    monkeypatch.setattr("mini_llm.data.quickstart.BASE_VOCAB_SIZE", 508)
    keep, figures, table = tmp_path / "keep", tmp_path / "figures.json", tmp_path / "table.md"
    flags = ["learning", "--model", "mini_llama3_tiny", "--steps", "4", "--seeds", "3"]
    flags += ["--keep", str(keep), "--json", str(figures), "--markdown", str(table)]
    bench.main(flags)
    first = figures.read_text()
    found = json.loads(first)
    of_model = found["models"]["mini_llama3_tiny"]
    (recipe,), (trainer,) = of_model["recipe"], of_model["trainer"]
    # The same weights, drawn from the same seed, see the same rows: the losses begin alike, and
    # after steps of the same size end alike.
    assert recipe["first_training_loss"] == pytest.approx(trainer["first_training_loss"], abs=1e-3)
    assert recipe["loss"] == pytest.approx(trainer["loss"], abs=1e-3)
    assert recipe["loss"] < recipe["first_training_loss"] - 0.05
    assert recipe["tokens"] == trainer["tokens"] == found["held_out_tokens"] > 1000
    assert of_model["no_worse"] == {"recipe": None}  # one seed
    assert found["same_active_size"] is None and found["vocabulary"] == 512
    assert "not judged" in table.read_text()

    (keep / "mini_llama3_tiny/seed_3/trainer/final/model.safetensors").unlink()
    monkeypatch.setattr("subprocess.run", None)  # nothing is trained or evaluated again
    bench.main(flags)
    assert figures.read_text() == first
    capsys.readouterr()
    with pytest.raises(SystemExit):
        bench.main([*flags, "--steps", "5"])
    assert "holds runs of other settings (differing: steps" in capsys.readouterr().err
