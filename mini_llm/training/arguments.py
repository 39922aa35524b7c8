"""Run arguments: one dataclass, read from a YAML and overridden on the command line.

Imports nothing heavy, so that ``--help`` and a mistyped flag answer at once.
"""

# ruff: noqa: RUF009 - _arg() makes a dataclass field, as dataclasses.field() does

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml

from mini_llm.command_line import Parser
from mini_llm.launch.note import REFUSED, write_note
from mini_llm.parallel.environment import end_process, is_in_process_group
from mini_llm.parallel.rank_log import note

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS_FOR_RANK_0 = 5
DEFAULT_DEEPSPEED = "ds_configs/zero1.json"
SCHEDULES = ("cosine", "wsd", "constant")
MAPPINGS = {  # examples of the arguments that are mappings
    "data": '{"web": {"path": "data/packed", "weight": 1.0}}',
    "model_overrides": '{"num_hidden_layers": 4}',
}
BIAS_SPEED_HELP = "change of a router bias per optimizer step, towards equal load (DeepSeek-V3's γ)"


def _arg(help: str, default: Any = dataclasses.MISSING) -> Any:
    """A documented argument; mutable defaults are copied for every instance."""
    metadata = {"help": help}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunArguments:
    """What both recipes take; each adds its own and may change a default."""

    output_dir: str = _arg("the run's folder: checkpoints, metrics, plots, final model")
    # Model
    model: str = _arg("a preset name, or a folder / hub id of a checkpoint to start from")
    tokenizer: str = _arg("folder of the tokenizer; gives vocabulary size and special ids")
    attn_implementation: str = _arg("attention: sdpa | eager | flash_attention_2 …", "sdpa")
    # Data
    data: dict[str, Any] = _arg("sources: name -> {path, weight: share of rows} (JSON mapping)", {})
    seq_len: int = _arg("tokens per packed row; must be what the data was packed to", 2048)
    seed: int = _arg("decides initial weights and the order of the data", 42)
    # Batch and length
    max_steps: int = _arg("optimizer steps of the whole run; the schedule ends there", 1000)
    global_batch_tokens: int = _arg(
        "tokens per optimizer step over all ranks; gradient accumulation is derived from it",
        524_288,
    )
    per_device_train_batch_size: int = _arg("packed rows per rank and forward pass", 8)
    per_device_eval_batch_size: int = _arg("packed rows per rank and evaluation pass", 8)
    # Optimizer (AdamW) and schedule (linear warmup, cosine decay)
    learning_rate: float = _arg("peak learning rate; never multiplied by the number of ranks", 3e-4)
    lr_scheduler_type: str = _arg(
        "after the warmup: cosine | wsd (stable, then decay) | constant", "cosine"
    )
    min_lr_ratio: float = _arg("learning rate at the end, as a share of the peak", 0.1)
    decay_steps: int | None = _arg("steps of wsd's decay (default: 20% of max_steps)", None)
    warmup_steps: int | None = _arg("steps of linear warmup (default: 5% of max_steps)", None)
    weight_decay: float = _arg("decoupled weight decay, on matrices only", 0.1)
    adam_beta1: float = _arg("AdamW β1", 0.9)
    adam_beta2: float = _arg("AdamW β2", 0.95)
    adam_epsilon: float = _arg("AdamW ε", 1e-8)
    max_grad_norm: float = _arg("gradients are clipped to this global norm (0: not)", 1.0)
    # Mixture of experts and multi-token prediction (no effect on a model without them)
    expert_bias_update_speed: float = _arg(BIAS_SPEED_HELP, 1e-3)
    balance_loss_weight: float = _arg("weight of the load-balance loss (a mean over rows)", 1e-4)
    # Steps that go wrong (training/bad_steps.py)
    bad_step_policy: str = _arg(
        "after a gradient that is not finite, or a loss jump: stop | skip | rewind (to the newest "
        "checkpoint, and on with other rows)",
        "stop",
    )
    max_loss_jump: float = _arg(
        "a loss so many nats above the mean of the last steps is a bad step too (0: never)", 0.0
    )
    # Precision and engine
    bf16: bool = _arg("train in bfloat16 with fp32 master weights", False)
    gradient_checkpointing: bool = _arg("recompute activations in the backward pass", False)
    torch_compile: bool | None = _arg(
        "compile every decoder layer with torch.compile, which needs a C++ compiler on a CPU, a C "
        "compiler and Python's headers on a GPU (default: on a GPU, unless under ZeRO-3 or with "
        "spread experts)",
        None,
    )
    expert_parallel_size: int = _arg(
        "ranks over which every layer's experts are spread (1: each rank has all)", 1
    )
    deepspeed: str = _arg(
        "DeepSpeed JSON used when the Accelerate config names no engine, or none", DEFAULT_DEEPSPEED
    )
    ddp_timeout: int = _arg(
        "seconds after which a rank that gets nothing done, because it or another hangs, ends the "
        "job with an error that names the late rank",
        600,
    )
    # Watching
    logging_steps: int = _arg("steps between two logged steps (the first is always logged)", 10)
    eval_steps: int = _arg("steps between evaluations on the held-out rows (0: never)", 500)
    max_eval_rows: int = _arg(
        "held-out rows per source and evaluation (0: all; raw text needs a limit)", 256
    )
    report_to: str = _arg("trackers, comma-separated: tensorboard, wandb; or none", "tensorboard")
    peak_flops: float | None = _arg(
        "bf16 FLOP/s that one device can do at most, for perf/mfu (default: what is known of the "
        "GPU)",
        None,
    )
    run_name: str | None = _arg("name of the run in W&B (default: the output folder's name)", None)
    profile_steps: str | None = _arg(
        "first:last optimizer steps to profile, into output_dir/profile/rank-<r>/: a torch "
        "profiler trace and, on a CUDA device, a memory snapshot",
        None,
    )
    sample_prompts: list[Any] = _arg(
        "begins of texts to continue at every evaluation and when training ends (JSON list)", []
    )
    sample_max_new_tokens: int = _arg("most tokens generated for each sample prompt", 64)
    # Checkpoints
    save_steps: int = _arg("steps between checkpoints (0: only when the run ends or stops)", 500)
    save_total_limit: int = _arg("newest checkpoints to keep", 2)
    resume_from_checkpoint: str = _arg("auto (the newest complete one) | never | a folder", "auto")
    stop_at_step: int | None = _arg("save and leave at this step, as if interrupted there", None)
    milestone_steps: int = _arg(
        "checkpoints at multiples of this step are kept for good, if saved (0: none)", 0
    )
    save_minutes: float = _arg("minutes between checkpoints, besides save_steps (0: never)", 0.0)
    max_hours: float | None = _arg("save and leave after this time; the same command goes on", None)
    # Sharing: a push goes on beside training, which it neither stops nor waits for
    push_to_hub: bool = _arg(
        "push the model to the Hugging Face hub at every save and at the end; the token comes from "
        "HF_TOKEN or `hf auth login`",
        False,
    )
    hub_model_id: str | None = _arg("where to: owner/name, made if it is not there", None)
    hub_private: bool = _arg("a repository that --push_to_hub makes is private", True)
    hub_wait_seconds: int = _arg(
        "how long the end of a run waits for the last push; afterwards it can be repeated", 600
    )
    hub_license: str = _arg(
        "licence of the weights, for the model card: an id of the hub", "unknown"
    )
    hub_language: str = _arg("languages of the data, for the model card, e.g. zh,en", "")
    # Looking without running
    dry_run: bool = _arg("print the resolved config, sizes and two decoded rows, then exit", False)

    @property
    def trackers(self) -> list[str]:
        """``report_to`` as a list."""
        names = [name.strip() for name in self.report_to.split(",")]
        return [name for name in names if name and name != "none"]

    @property
    def warmup(self) -> int:
        """Warmup in steps, the default resolved."""
        return self.warmup_steps if self.warmup_steps is not None else round(0.05 * self.max_steps)

    @property
    def decay(self) -> int:
        """Steps of the decay of ``wsd``, the default resolved."""
        return self.decay_steps if self.decay_steps is not None else round(0.2 * self.max_steps)

    def rows_per_step(self) -> int:
        """Packed rows of one optimizer step over all ranks."""
        return self.global_batch_tokens // self.seq_len

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.rows_per_step() // (world_size * self.per_device_train_batch_size)


@dataclass
class PretrainArguments(RunArguments):
    """Everything that determines a pretraining run. Units are in the help texts."""

    model_overrides: dict[str, Any] = _arg(
        "config fields to change in the preset (JSON mapping)", {}
    )
    data: dict[str, Any] = _arg(
        "sources: name -> {path, weight: share of rows} (JSON mapping); a path is a folder written "
        "by prepare_pretrain.py, or raw text: a folder, a file or a list of .parquet or .jsonl "
        "files; each may also be an https:// or hf:// URL",
        {},
    )
    quickstart_data: bool = _arg(
        "first build the quickstart corpus, tokenizer and packed rows if --data names them and "
        "they are missing",
        False,
    )
    mtp_loss_weight: float = _arg("weight of the multi-token-prediction loss", 0.3)
    mtp_loss_final_weight: float = _arg("… in the last third of the run", 0.1)


@dataclass
class SftArguments(RunArguments):
    """Everything that determines a run of supervised fine-tuning. Units are in the help texts."""

    model: str = _arg("folder or hub id of the pretrained model to start from")
    tokenizer: str = _arg("folder of the tokenizer (default: the model's own)", "")
    data: dict[str, Any] = _arg(
        "sources of conversations: name -> {path, weight: share of rows} (JSON mapping); a path is "
        "a folder written by prepare_sft.py, ready-made token parquet, raw conversations (a folder,"
        " a file or a list of .jsonl or .parquet files; also https:// or hf:// URLs), or the name "
        "of a hub dataset, with its config and split beside it",
        {},
    )
    quickstart_data: bool = _arg(
        "first build and pack the quickstart's conversations if --data names them and they are "
        "missing",
        False,
    )
    packing: bool = _arg(
        "pack many conversations into a row; false computes each in a row of its own, padded: the "
        "same gradients, slower",
        True,
    )
    num_train_epochs: float = _arg(
        "passes over the data, which then decide --max_steps (0: they do not; packed data only); "
        "--max_steps alone on the command line wins over the YAML's passes",
        0.0,
    )
    global_batch_tokens: int = _arg(
        "tokens per optimizer step over all ranks; gradient accumulation is derived from it", 65_536
    )
    learning_rate: float = _arg("peak learning rate; never multiplied by the number of ranks", 5e-5)
    weight_decay: float = _arg("decoupled weight decay, on matrices only", 0.0)
    expert_bias_update_speed: float = _arg(f"{BIAS_SPEED_HELP}; 0 keeps it as pretrained", 0.0)
    balance_loss_weight: float = _arg("weight of the load-balance loss (a mean over rows)", 0.0)
    mtp_loss_weight: float = _arg(
        "weight of the multi-token-prediction loss; 0 keeps those layers as pretrained", 0.0
    )
    eval_steps: int = _arg(
        "steps between evaluations on the held-out rows, and samples (0: never)", 100
    )
    sample_prompts: list[Any] = _arg(
        "what to ask at every evaluation and when training ends: questions, or lists of messages "
        "that end with one (JSON list)",
        [],
    )
    sample_max_new_tokens: int = _arg("most tokens of an answer", 256)


Arguments = TypeVar("Arguments", bound=RunArguments)


def parse_arguments(
    cls: type[Arguments], default_config: str, command_line: list[str] | None = None
) -> Arguments:
    """Read ``--config`` (else ``default_config``), then the command line over it.

    Mistakes end the process with status 2 and one sentence; only rank 0 prints it.
    """
    types = get_type_hints(cls)
    parser = _Parser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description=(cls.__doc__ or "").strip(),
        epilog="Every flag is also a key of the YAML; the command line wins.",
    )
    parser.add_argument(
        "--config", default=default_config, metavar="FILE", help="YAML with the run's arguments"
    )
    for item in dataclasses.fields(cls):
        kind = _plain_type(types[item.name])
        parser.add_argument(
            f"--{item.name}",
            default=argparse.SUPPRESS,
            metavar={dict: "JSON", list: "JSON", bool: "true|false"}.get(
                kind, kind.__name__.upper()
            ),
            nargs="?" if kind is bool else None,
            const="true" if kind is bool else None,
            help=f"{item.metadata['help']} {_default_text(item)}".replace("%", "%%"),
        )
    words = sys.argv[1:] if command_line is None else command_line
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(_unknown_name("flag", unknown[0].split("=")[0], cls, prefix="--"))
    flags = vars(namespace)
    config_path = _existing(flags.pop("config"), "--config", parser)
    try:
        loaded = yaml.safe_load(config_path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config: {config_path} is no YAML ({' '.join(str(error).split())})")
    if not isinstance(loaded, dict):
        parser.error(f"--config: {config_path} is not a mapping of argument names to values")
    for name in loaded:
        if name not in types:
            parser.error(f"{config_path}: {_unknown_name('key', str(name), cls)}")
    values: dict[str, Any] = {}
    for name, value in loaded.items():
        values[name] = _convert(value, types[name], f"{config_path}: {name}", parser)
    for name, value in flags.items():
        values[name] = _convert(value, types[name], f"--{name}", parser)
    if "max_steps" in flags and "num_train_epochs" in types and "num_train_epochs" not in flags:
        values["num_train_epochs"] = 0.0  # the file's would decide over the command line
    for item in dataclasses.fields(cls):
        required = item.default is dataclasses.MISSING is item.default_factory
        if required and item.name not in values:
            parser.error(f"--{item.name} is missing: {item.metadata['help']}")
    if values.get("deepspeed", DEFAULT_DEEPSPEED) != "none":
        found = _existing(values.get("deepspeed", DEFAULT_DEEPSPEED), "--deepspeed", parser)
        values["deepspeed"] = str(found)
    return cls(**values)


class _Parser(Parser):
    """The sentence from rank 0 alone."""

    def error(self, message: str) -> NoReturn:
        stop(message)


def stop(message: str) -> NoReturn:
    """End this process with status 2 and one sentence on stderr.

    The launcher kills all ranks as soon as one leaves, so the others let rank 0 speak and leave
    first; a mistake that only they have, on another node say, is still printed, a little later.
    """
    write_note(REFUSED)
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        note(f"error: {message}")
        time.sleep(SECONDS_FOR_RANK_0)
        print(f"error on rank {rank}: {message}", file=sys.stderr, flush=True)
    if is_in_process_group():
        end_process(2)
    raise SystemExit(2)


def _existing(path: str, flag: str, parser: _Parser) -> Path:
    """``path`` as given or, for the files that come with the project, under the repository."""
    for candidate in (Path(path), REPOSITORY / path):
        if candidate.is_file():
            return candidate
    parser.error(f"{flag}: there is no file {path}")


def _plain_type(annotation: Any) -> type:
    """``int | None`` -> int, ``dict[str, Any]`` -> dict."""
    options = [option for option in get_args(annotation) if option is not type(None)]
    if type(None) in get_args(annotation):
        annotation = options[0]
    return getattr(annotation, "__origin__", annotation)


def _default_text(item: dataclasses.Field[Any]) -> str:
    if item.default is not dataclasses.MISSING:
        return "" if item.default is None else f"[{item.default}]"
    return "[required]" if item.default_factory is dataclasses.MISSING else ""


def _convert(value: Any, annotation: Any, name: str, parser: _Parser) -> Any:
    """``value`` from YAML or the command line as the argument's type."""
    kind = _plain_type(annotation)
    if value is None or (value == "none" and kind is int):
        if type(None) in get_args(annotation):
            return None
        parser.error(f"{name} is empty; it takes a {kind.__name__}")
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind in (dict, list):
            value = json.loads(value) if isinstance(value, str) else value
            if not isinstance(value, kind):
                raise ValueError
            return value
        if kind is int:
            if float(value) != int(float(value)) or isinstance(value, bool):
                raise ValueError
            return int(float(value))  # 1e6 is a fine way to write a million
        if kind is float:
            return float(value)
        if isinstance(value, (dict, list)):
            raise ValueError
        return str(value)
    except (KeyError, ValueError, TypeError, OverflowError):
        expected = {
            bool: "true or false",
            dict: f"a mapping, e.g. {MAPPINGS.get(name.split()[-1].lstrip('-'))}",
            list: 'a list, e.g. ["a", "b"]',
            int: "a whole number",
            float: "a number",
            str: "a text",
        }[kind]
        parser.error(f"{name}: {value!r} is not {expected}")


def _unknown_name(what: str, name: str, cls: type, prefix: str = "") -> str:
    known = [prefix + item.name for item in dataclasses.fields(cls)] + [prefix + "config"]
    near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"unknown {what} {name}; the nearest is {near} (see --help)"


def steps_of_epochs(args: SftArguments, rows_per_epoch: int | None) -> int:
    """Optimizer steps of ``--num_train_epochs``. Raises ValueError where rows cannot be counted."""
    if rows_per_epoch is None:
        raise ValueError(
            "--num_train_epochs: raw conversations are not counted before they are packed; give "
            "--max_steps, or pack them with data_tools/prepare_sft.py"
        )
    return math.ceil(args.num_train_epochs * rows_per_epoch / args.rows_per_step())


def profiled_steps(text: str) -> tuple[int, int]:
    """First and last step of ``--profile_steps``. Raises ValueError naming the flag."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(
            f"--profile_steps {text}: give the first and the last optimizer step to profile, "
            'counted from 1, as 10:12 (in a YAML file in quotes, "10:12": else that is a time)'
        )
    return int(first), int(last)


def check_arguments(args: RunArguments, world_size: int, *, steps_known: bool = True) -> None:
    """Refuse values that cannot train, before anything is built. Raises ValueError.

    ``steps_known`` False: ``max_steps`` is not yet that of the run (``--num_train_epochs``).
    """
    if not args.output_dir:  # an unset variable of the shell; Path("") is the current folder
        raise ValueError("--output_dir is empty; give the folder of the run")
    positive = ("seq_len", "max_steps", "per_device_train_batch_size", "logging_steps")
    used_later = ("per_device_eval_batch_size", "sample_max_new_tokens", "stop_at_step")
    for name in (*positive, "ddp_timeout", *used_later):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    not_negative = ("save_steps", "eval_steps", "max_eval_rows", "weight_decay", "max_grad_norm")
    for name in (
        *not_negative,
        "milestone_steps",
        "save_minutes",
        "max_loss_jump",
        "hub_wait_seconds",
        "adam_epsilon",
        "balance_loss_weight",
    ):
        if not getattr(args, name) >= 0:  # NaN neither
            raise ValueError(f"--{name} is {getattr(args, name)}; it must not be negative")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed is {args.seed}; it must be in [0, 2^32), as numpy's seeds are")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be in [0, 1)")
    size = args.expert_parallel_size
    if size < 1 or world_size % size:
        raise ValueError(
            f"--expert_parallel_size {size} does not divide the {world_size} rank(s) of the job "
            "into groups; give a divisor, or start more ranks"
        )
    if size > 1 and args.torch_compile:
        raise ValueError(
            f"--expert_parallel_size {size} with --torch_compile true is not supported; leave one "
            "out"
        )
    if args.peak_flops is not None and args.peak_flops <= 0:
        raise ValueError(
            f"--peak_flops is {args.peak_flops}; give the FLOP/s of one device, e.g. 989e12"
        )
    if args.bad_step_policy not in ("stop", "skip", "rewind"):
        raise ValueError(f"--bad_step_policy {args.bad_step_policy} is none of stop, skip, rewind")
    if args.max_loss_jump and args.bad_step_policy == "skip":
        raise ValueError(
            "--max_loss_jump sees a jump after the step was made, which --bad_step_policy skip "
            "cannot undo; give stop or rewind"
        )
    if args.max_hours is not None and not args.max_hours > 0:
        raise ValueError(f"--max_hours is {args.max_hours}; it must be above 0")
    if args.save_total_limit < 1:
        raise ValueError("--save_total_limit must be at least 1: a resume needs one checkpoint")
    own = ("num_train_epochs", "mtp_loss_weight", "mtp_loss_final_weight")  # of one recipe or both
    for name in (*own, "expert_bias_update_speed"):
        if not getattr(args, name, 0) >= 0:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must not be negative")
    if not 0 < args.learning_rate < 1:
        raise ValueError(f"--learning_rate is {args.learning_rate}; it must be in (0, 1)")
    if not 0 <= args.min_lr_ratio <= 1:
        raise ValueError(f"--min_lr_ratio is {args.min_lr_ratio}; it must be in [0, 1]")
    if args.warmup < 0:
        raise ValueError(f"--warmup_steps is {args.warmup}; it must not be negative")
    if args.lr_scheduler_type not in SCHEDULES:
        raise ValueError(
            f"--lr_scheduler_type {args.lr_scheduler_type} is none of {', '.join(SCHEDULES)}"
        )
    if args.decay_steps is not None and args.lr_scheduler_type != "wsd":
        raise ValueError(
            "--decay_steps belongs to --lr_scheduler_type wsd; leave it out or choose that"
        )
    last_step = args.max_steps if steps_known else sys.maxsize
    if args.decay < 0 or (args.lr_scheduler_type == "wsd" and args.decay > last_step):
        raise ValueError(f"--decay_steps is {args.decay}; it must lie in 0..{args.max_steps}")
    if args.profile_steps is not None:
        _, last = profiled_steps(args.profile_steps)
        if last > last_step:
            raise ValueError(
                f"--profile_steps {args.profile_steps} ends after --max_steps {args.max_steps}; "
                "give steps that the run takes"
            )
    unknown = set(args.trackers) - {"tensorboard", "wandb"}
    if unknown:
        raise ValueError(f"--report_to: {sorted(unknown)[0]!r} is not tensorboard, wandb or none")
    micro = args.per_device_train_batch_size * world_size * args.seq_len
    if args.global_batch_tokens < micro or args.global_batch_tokens % micro:
        below = max(args.global_batch_tokens // micro, 1) * micro
        raise ValueError(
            f"--global_batch_tokens {args.global_batch_tokens} cannot be divided over {world_size} "
            f"rank(s) × --per_device_train_batch_size {args.per_device_train_batch_size} × "
            f"--seq_len {args.seq_len} = {micro} tokens per pass; use a multiple of {micro} such "
            f"as {below}" + (f" or {below + micro}" if args.global_batch_tokens > micro else "")
        )
    if not args.data:
        raise ValueError('--data is empty; give it as {"name": {"path": "folder", "weight": 1}}')
