"""YAML, command line and the sentences that mistakes get."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from mini_llm.models import build_model, check_model
from mini_llm.training.arguments import (
    PretrainArguments,
    RunArguments,
    SftArguments,
    check_arguments,
    parse_arguments,
    steps_of_epochs,
)
from mini_llm.training.banner import warmup_warning

QUICKSTART = "recipes/configs/quickstart/pretrain.yaml"
CONFIGS = sorted(Path(__file__).resolve().parents[2].glob("recipes/configs/*/*.yaml"))
ARGUMENTS_OF: dict[str, type[RunArguments]] = {"pretrain": PretrainArguments, "sft": SftArguments}


def parse(*words: str, config: str = QUICKSTART) -> PretrainArguments:
    return parse_arguments(PretrainArguments, config, list(words))


def error_of(capsys, *words: str, config: str = QUICKSTART) -> str:
    with pytest.raises(SystemExit) as exit_info:
        parse(*words, config=config)
    assert exit_info.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1  # one sentence, no traceback
    return text


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_yaml_parses_and_divides_its_batch_on_one_rank(config):
    args = parse_arguments(ARGUMENTS_OF[config.stem], str(config), [])
    check_arguments(args, world_size=1)


def test_every_model_has_both_yamls():
    folders = {config.parent.name for config in CONFIGS}
    assert folders == {"quickstart", "mini_llama3", "mini_deepseekv3", "mini_qwen3_next"}
    assert len(CONFIGS) == 2 * len(folders)


@pytest.mark.parametrize("folder", sorted({config.parent.name for config in CONFIGS}))
def test_a_shorter_pretraining_has_a_shorter_warmup_and_reaches_its_learning_rate(folder):
    config = f"recipes/configs/{folder}/pretrain.yaml"
    whole, short = parse(config=config), parse("--max_steps", "100", config=config)
    assert (whole.warmup, short.warmup) == (whole.max_steps // 20, 5)


def test_a_warmup_that_takes_the_whole_run_is_warned_of_with_the_rate_that_it_reaches():
    def warning(*flags: str) -> str:
        args = parse("--max_steps", "10", "--learning_rate", "4e-3", *flags)
        check_arguments(args, world_size=1)  # a trial may be that short
        return warmup_warning(args)

    assert warning() == warning("--warmup_steps", "9") == ""
    assert "--warmup_steps 20" in warning("--warmup_steps", "20")
    assert "only rises, to 2.00e-03 of" in warning("--warmup_steps", "20")
    assert "to 4.00e-03 of" in warning("--warmup_steps", "10")


def test_epochs_become_steps_and_raw_data_whose_rows_nobody_counted_is_refused():
    config = "recipes/configs/quickstart/sft.yaml"
    args = parse_arguments(SftArguments, config, ["--num_train_epochs", "1.5"])
    rows = args.rows_per_step()
    assert steps_of_epochs(args, 10 * rows) == 15
    assert steps_of_epochs(args, 10 * rows + 1) == 16  # the last rows are not left out
    with pytest.raises(ValueError, match="--num_train_epochs: .*--max_steps"):
        steps_of_epochs(args, None)


def test_steps_on_the_command_line_win_over_the_epochs_of_the_yaml():
    config = "recipes/configs/quickstart/sft.yaml"
    args = parse_arguments(SftArguments, config, ["--max_steps", "7"])
    assert (args.max_steps, args.num_train_epochs) == (7, 0)
    assert parse_arguments(SftArguments, config, []).num_train_epochs == 4
    both = parse_arguments(SftArguments, config, ["--max_steps", "7", "--num_train_epochs", "1"])
    assert both.num_train_epochs == 1  # asked for as well


def test_the_command_line_wins_over_the_yaml():
    args = parse("--max_steps", "7", "--learning_rate=1e-4", "--bf16", "true", "--run_name", "x")
    assert (args.max_steps, args.learning_rate, args.bf16, args.run_name) == (7, 1e-4, True, "x")
    assert args.seq_len == 256  # from the YAML


def test_numbers_mappings_lists_and_booleans_are_read_as_what_they_are():
    args = parse(
        *("--global_batch_tokens", "1e6", "--dry_run"),
        *("--data", '{"a": {"path": "p", "weight": 2}}', "--sample_prompts", '["x"]'),
    )
    assert args.global_batch_tokens == 1_000_000 and args.dry_run is True
    assert args.data == {"a": {"path": "p", "weight": 2}} and args.sample_prompts == ["x"]


def test_a_resolved_config_is_read_back_as_the_same_arguments(tmp_path):
    args = parse("--max_steps", "7")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(args)))
    assert parse("--config", str(path)) == args


def test_unknown_flag_names_the_nearest(capsys):
    text = error_of(capsys, "--learning_rates", "1")
    assert "unknown flag --learning_rates" in text and "--learning_rate " in text


def test_an_abbreviated_flag_is_unknown(capsys):
    assert "unknown flag --max_step" in error_of(capsys, "--max_step", "3")


def test_unknown_yaml_key_names_the_file_and_the_nearest(capsys, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("output_dir: x\nmax_stepss: 3\n")
    text = error_of(capsys, "--config", str(path))
    assert "bad.yaml" in text and "max_stepss" in text and "max_steps" in text


@pytest.mark.parametrize("content", [b"data: {web: [\n", "run_name: café\n".encode("latin-1")])
def test_a_file_that_is_no_yaml_is_named_in_one_sentence(capsys, tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    text = error_of(capsys, "--config", str(path))
    assert f"--config: {path} is no YAML" in text and len(text.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--max_steps", "many"), "--max_steps: 'many' is not a whole number"),
        (("--max_steps", "1.5"), "is not a whole number"),
        (("--max_steps", "inf"), "--max_steps: 'inf' is not a whole number"),
        (("--bf16", "maybe"), "--bf16: 'maybe' is not true or false"),
        (("--data", "[1]"), "--data"),
        (("--data", "{broken"), "is not a mapping"),
        (("--data", "data/web"), 'e.g. {"web": {"path": "data/packed", "weight": 1.0}}'),
        (("--config", "nowhere.yaml"), "--config: there is no file nowhere.yaml"),
        (("--deepspeed", "nowhere.json"), "--deepspeed: there is no file nowhere.json"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(capsys, words, expected):
    assert expected in error_of(capsys, *words)


def test_a_missing_required_argument_is_named(capsys, tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert "--output_dir is missing" in error_of(capsys, "--config", str(path))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"global_batch_tokens": 2048 + 256}, "use a multiple of 2048 such as 2048 or 4096"),
        ({"global_batch_tokens": 256}, "--global_batch_tokens 256 cannot be divided"),
        ({"learning_rate": 30.0}, "--learning_rate"),
        ({"warmup_steps": -1}, "--warmup_steps"),
        ({"report_to": "mlflow"}, "--report_to"),
        ({"save_total_limit": 0}, "--save_total_limit"),
        ({"max_steps": 0}, "--max_steps"),
        ({"data": {}}, "--data is empty"),
        ({"output_dir": ""}, "--output_dir is empty; give the folder of the run"),
        ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size"),
        ({"per_device_eval_batch_size": -1}, "--per_device_eval_batch_size"),
        ({"sample_max_new_tokens": 0}, "--sample_max_new_tokens"),
        ({"stop_at_step": 0}, "--stop_at_step is 0; it must be at least 1"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**32}, "--seed"),
        ({"adam_beta2": 1.0}, "--adam_beta2"),
        ({"adam_epsilon": -1.0}, "--adam_epsilon"),
        ({"max_hours": float("nan")}, "--max_hours"),
        ({"weight_decay": float("nan")}, "--weight_decay"),
        ({"balance_loss_weight": -1.0}, "--balance_loss_weight"),
        ({"mtp_loss_final_weight": -1.0}, "--mtp_loss_final_weight"),
        ({"profile_steps": "12"}, "--profile_steps 12: give the first and the last"),
        ({"profile_steps": "12:10"}, "--profile_steps 12:10: give the first and the last"),
        ({"profile_steps": "²:3"}, "--profile_steps ²:3: give the first and the last"),
        ({"profile_steps": "622"}, 'in a YAML file in quotes, "10:12"'),  # YAML's reading of 10:22
        ({"profile_steps": "10:900000"}, "ends after --max_steps"),
    ],
)
def test_values_that_cannot_train_are_refused_by_flag(changes, expected):
    args = dataclasses.replace(parse("--per_device_train_batch_size", "4"), **changes)
    with pytest.raises(ValueError, match="--") as error:
        check_arguments(args, world_size=2)
    assert expected in str(error.value)


def test_steps_of_a_run_whose_length_is_not_yet_known_are_judged_when_it_is():
    flags = ("--profile_steps", "1200:1201", "--lr_scheduler_type", "wsd", "--decay_steps", "1100")
    args = parse("--max_steps", "1000", *flags)
    check_arguments(args, world_size=1, steps_known=False)
    for steps, expected in ((1000, "--decay_steps is 1100"), (1200, "--profile_steps 1200:1201")):
        with pytest.raises(ValueError, match=expected):
            check_arguments(dataclasses.replace(args, max_steps=steps), world_size=1)
    check_arguments(dataclasses.replace(args, max_steps=1201), world_size=1)


def test_accumulation_is_derived_from_the_global_batch():
    args = parse("--global_batch_tokens", str(256 * 64), "--per_device_train_batch_size", "8")
    assert [args.gradient_accumulation_steps(n) for n in (1, 2, 4)] == [8, 4, 2]


def test_every_argument_is_documented(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for item in dataclasses.fields(PretrainArguments):
        assert f"--{item.name}" in text and item.metadata["help"]


@pytest.mark.parametrize(
    ("model", "overrides", "expected"),
    [
        ("mini_llama3_tiny", {"hiden_size": 64}, "'hiden_size' is not a field"),
        ("mini_llama3_tiny", {"num_attention_heads": 5}, "not a multiple of .*heads"),
        ("mini_llama3_tiny", {"num_key_value_heads": 3}, "multiple of num_key_value_heads 3"),
        ("mini_llama3_tiny", {"hidden_size": "wide"}, "hidden_size"),
        ("mini_deepseekv3_tiny", {"n_routed_experts": 4}, "n_routed_experts 4 must be .*n_group 4"),
        ("mini_deepseekv3_tiny", {"n_routed_experts": 10}, "multiple of n_group 4"),
        ("mini_deepseekv3_tiny", {"num_experts_per_tok": 9}, "9 is more than the 8 experts"),
        ("mini_deepseekv3_tiny", {"num_experts_per_tok": 5}, "5 is more than the 4 .* 2 groups"),
        ("mini_deepseekv3_tiny", {"moe_intermediate_size": 60}, "multiples of 8"),
        ("mini_qwen3_next_tiny", {"num_experts": 1}, "2 is more than the 1 experts"),
        ("mini_qwen3_next_tiny", {"num_hidden_layers": 2}, "no layer has full attention"),
        ("mini_qwen3_next_tiny", {"num_key_value_heads": 3}, "multiple of num_key_value_heads 3"),
        ("mini_qwen3_next_tiny", {"linear_num_key_heads": 3}, "multiple of linear_num_key_heads 3"),
    ],
)
def test_overrides_that_make_no_model_are_refused_before_one_is_built(model, overrides, expected):
    with pytest.raises(ValueError, match=f"^--model_overrides: .*{expected}"):
        check_model(model, overrides)


def test_overrides_that_would_change_a_checkpoint_are_refused_and_not_ignored(tmp_path):
    own = {"num_hidden_layers": 1, "vocab_size": 64}
    build_model("mini_llama3_tiny", **own).save_pretrained(tmp_path)
    check_model(str(tmp_path), own)
    with pytest.raises(ValueError, match="num_hidden_layers is 2 there and 1 in"):
        check_model(str(tmp_path), {**own, "num_hidden_layers": 2})
