"""The run folder: which run it belongs to, and the facts of the engine that trained it."""

import dataclasses
import hashlib
import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from mini_llm.data.tokenizer import tokenizer_fingerprint
from mini_llm.durable import write_whole
from mini_llm.hub.model_card import from_hub
from mini_llm.models import kernels_in_use
from mini_llm.parallel.compile import is_compiled
from mini_llm.parallel.engine import offload, zero_stage
from mini_llm.parallel.expert_parallel import expert_groups

from .arguments import RunArguments, SftArguments
from .optimizer import describe_optimizer
from .sizes import ParameterCounts

PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "datasets", "tokenizers", "numpy")


def run_identity(
    args: RunArguments, fingerprint_of_tokenizer: str, data_fingerprint: str
) -> dict[str, Any]:
    """What makes two runs the same run: model, data, tokenizer and seed."""
    return {
        "model": args.model,
        "model_overrides": getattr(args, "model_overrides", {}),
        "tokenizer_fingerprint": fingerprint_of_tokenizer,
        "data": {name: source.get("weight", 1) for name, source in args.data.items()},
        "data_fingerprint": data_fingerprint,
        "seq_len": args.seq_len,
        "seed": args.seed,
    }


def check_run_folder(output_dir: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder that holds another run. Raises ValueError naming the keys that differ."""
    path = output_dir / "run.json"
    if not path.is_file():
        return
    try:
        theirs = json.loads(path.read_text()).get("identity", {})
    except ValueError as error:
        raise ValueError(
            f"--output_dir: {path} cannot be read ({error}); delete it if the folder is this run's"
        ) from error
    differing = [key for key in identity if theirs.get(key) != identity[key]]
    if differing:
        details = ", ".join(
            f"{key}: {theirs.get(key)} there, {identity[key]} here" for key in differing
        )
        raise ValueError(
            f"--output_dir {output_dir} holds another run ({details}); choose another --output_dir"
        )


def final_step(output_dir: Path) -> int | None:
    """The optimizer step that final/ was made at, the last in metrics.jsonl; None without both."""
    metrics = output_dir / "metrics.jsonl"
    if not (output_dir / "final").exists() or not metrics.is_file():
        return None
    steps = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return int(json.loads(steps[-1])["step"]) if steps else None


def set_final_aside(output_dir: Path, max_steps: int) -> None:
    """Rename the final/ of a run that goes on to ``max_steps`` to final-step-N/; on rank 0.

    final/ tells that a run is finished, and its model card what the run's last step was.
    """
    step = final_step(output_dir)
    if step is None or step >= max_steps:
        return
    aside = output_dir / f"final-step-{step}"
    if aside.exists():
        shutil.rmtree(aside)
    (output_dir / "final").rename(aside)
    print(f"the run goes on to step {max_steps}: its final/ of step {step} is now {aside}")


def check_tokenizer_of_model(model: str | Path, tokenizer: str, fingerprint: str) -> None:
    """Refuse to go on from weights with another tokenizer than theirs. Raises ValueError.

    Embeddings are rows of the tokenizer's ids: with another one they mean nothing, even where the
    sizes agree. ``fingerprint`` is that of ``tokenizer``.
    """
    if not (Path(model) / "tokenizer.json").is_file():  # a preset, or weights alone
        return
    theirs = tokenizer_fingerprint(model)
    if theirs != fingerprint:
        raise ValueError(
            f"--tokenizer {tokenizer} (fingerprint {fingerprint[:12]}) is not the one that "
            f"--model {model} was trained with ({theirs[:12]}), so its embeddings would mean "
            f"other tokens; give --tokenizer {model} and data packed by it, or train a preset"
        )


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_config(output_dir: Path, args: RunArguments) -> None:
    """config.yaml: every argument as resolved; ``--config`` accepts it again."""
    output_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dataclasses.asdict(args), sort_keys=False, allow_unicode=True)
    write_whole(output_dir / "config.yaml", text)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def code_version() -> str:
    """A hash of this project's Python code, as it lies beside this file: ranks may be elsewhere."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted([*root.glob("mini_llm/**/*.py"), *root.glob("recipes/*.py")]):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def common_facts(
    args: RunArguments, accelerator: Any, identity: dict[str, Any], checkpoint: Path | None
) -> dict[str, str]:
    """What must be the same on all ranks, by name: arguments, code, versions, data, engine."""
    facts = {f"--{name}": str(value) for name, value in dataclasses.asdict(args).items()}
    facts["code version"] = code_version()
    facts |= {f"version of {name}": number for name, number in versions().items()}
    facts["data fingerprint"] = identity["data_fingerprint"][:12]
    facts["tokenizer fingerprint"] = identity["tokenizer_fingerprint"][:12]
    facts["checkpoint"] = str(checkpoint)
    facts["device"] = accelerator.device.type
    plugin = accelerator.state.deepspeed_plugin
    facts["DeepSpeed config"] = (
        "none" if plugin is None else json.dumps(plugin.deepspeed_config, sort_keys=True)
    )
    return facts


def write_run_facts(
    output_dir: Path,
    args: RunArguments,
    accelerator: Any,
    model: Any,
    optimizer: Any,
    parameters: ParameterCounts,
    identity: dict[str, Any],
    held: dict[str, int],
) -> None:
    """run.json: what really ran. ``held`` is this rank's measured bytes; every rank calls this."""
    from accelerate.utils import gather_object

    per_rank = gather_object([held])
    hosts = gather_object([platform.node()])
    if not accelerator.is_main_process:
        return
    unwrapped = accelerator.unwrap_model(model)
    facts = {
        "recipe": "sft" if isinstance(args, SftArguments) else "pretrain",
        "from_hub": from_hub(args),
        "parameters": dataclasses.asdict(parameters),
        "world_size": accelerator.num_processes,
        "hosts": hosts,  # of each rank
        "distributed_type": accelerator.distributed_type.value,
        "zero_stage": zero_stage(accelerator, model),
        "offload": offload(model),
        "expert_parallel_size": args.expert_parallel_size,
        "expert_groups": expert_groups(args.expert_parallel_size, accelerator.num_processes),
        "backend": accelerator.state.backend,
        "device": str(accelerator.device),
        "wrapper": type(model).__name__,
        "gradient_accumulation_steps": args.gradient_accumulation_steps(accelerator.num_processes),
        "bytes_per_rank": {kind: [rank[kind] for rank in per_rank] for kind in sorted(held)},
        "versions": versions(),
        "kernels": {
            **kernels_in_use(
                unwrapped.config,
                device_type=accelerator.device.type,
                half_precision=args.bf16,
                compiled=is_compiled(unwrapped),
            ),
            "layers": "torch.compile" if is_compiled(unwrapped) else "eager",
            "optimizer": describe_optimizer(optimizer),
        },
        "data_fingerprint": identity["data_fingerprint"],
        "identity": identity,
    }
    write_json(output_dir / "run.json", facts)
