"""The checkpoint that is evaluated: where it lies, whose run it is of, its model and tokenizer."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mini_llm.command_line import UsageError


@dataclass(frozen=True)
class Checkpoint:
    """A stock checkpoint: a folder or a hub id, and the run that wrote it, where one did.

    ``step`` is that of a ``checkpoints/step-N``; None for ``final/`` and for other models.
    """

    where: str
    run: Path | None = None
    step: int | None = None

    @property
    def name(self) -> str:
        """As a reader calls it: its path or hub id."""
        return str(Path(self.where).parent) if self.step is not None else self.where

    @property
    def run_config(self) -> dict[str, Any]:
        """The run's resolved arguments; {} where no run wrote the checkpoint."""
        if self.run is None:
            return {}
        path = self.run / "config.yaml"
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise UsageError(f"{path} cannot be read ({error}); restore it") from None
        if not isinstance(content, dict):
            raise UsageError(f"{path} holds no mapping; restore it")
        return content

    @property
    def is_fine_tuned(self) -> bool:
        """Whether recipes/sft.py wrote it."""
        return "packing" in self.run_config

    @property
    def last_step(self) -> int | None:
        """The optimizer step of the weights; None where no run says it."""
        if self.step is not None or self.run is None:
            return self.step
        from mini_llm.plots.runs import PlotError, read_metrics

        try:
            steps = read_metrics(self.run)
        except PlotError as error:
            raise UsageError(str(error)) from None
        return int(steps[-1]["step"]) if steps else None


def find_checkpoint(name: str) -> Checkpoint:
    """What CKPT names. Raises UsageError in one sentence; asks the hub for nothing yet."""
    folder = Path(name)
    if not folder.exists():
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            return Checkpoint(name)
        raise UsageError(f"{name} does not exist; give a run folder, a checkpoint or a hub id")
    if not folder.is_dir():
        raise UsageError(f"{name} is a file; give the folder of a run or of a checkpoint")
    here = folder.resolve()
    is_of_run = any(
        (place / file).is_file()
        for place in (here, here.parent)
        for file in ("run.json", "state.json")
    )
    if is_of_run or (folder / "checkpoints").is_dir():
        from mini_llm.hub.push import find_source

        try:
            source = find_source(folder)
        except ValueError as error:
            raise UsageError(str(error)) from None
        run = source.run
        if run is not None and not (run / "config.yaml").is_file():
            run = None
        return Checkpoint(_short(source.weights), run and Path(_short(run)), source.step)
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{name} has no config.json and is no run folder; give a run folder, its final/, one "
            "of its checkpoints/step-N, or the folder of another model"
        )
    return Checkpoint(name)


def _short(path: Path) -> str:
    """The path from here where it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def load_config(checkpoint: Checkpoint) -> Any:
    """The config of the model. Raises UsageError where there is none, here or on the hub."""
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig

    try:
        if not Path(checkpoint.where).is_dir():
            # Asks a hub that is out of reach once; AutoConfig asks six times, and says so.
            snapshot_download(checkpoint.where, allow_patterns="config.json")
        return AutoConfig.from_pretrained(checkpoint.where)
    except (OSError, ValueError) as error:
        raise UsageError(_not_there(checkpoint, error)) from None


def _not_there(checkpoint: Checkpoint, error: Exception) -> str:
    from mini_llm.models import why_not_from_hub

    reason = why_not_from_hub(error)
    if Path(checkpoint.where).is_dir():
        return f"{checkpoint.where} is no model that transformers opens ({reason})"
    return (
        f"{checkpoint.where} is no folder here and cannot be had from the hub ({reason}); check "
        "the path, or the id with HF_ENDPOINT and HF_TOKEN"
    )


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own tokenizer. Raises UsageError where it has none, or a slow one."""
    from transformers import AutoTokenizer

    reason = "its vocabulary is empty"
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.where)
        # Where there are no files, transformers may make one that has special tokens alone.
        is_there = set(tokenizer.get_vocab().values()) > tokenizer.added_tokens_decoder.keys()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        is_there, reason = False, " ".join(str(error).split())[:200]
    if not is_there:
        raise UsageError(
            f"{checkpoint.where} has no tokenizer that transformers opens ({reason}); put the "
            "tokenizer that it was trained with beside its weights"
        )
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer of {checkpoint.where} is not a fast one, so nobody knows which text "
            "its tokens stand for; save it with a tokenizer.json"
        )
    return tokenizer


def load_model(checkpoint: Checkpoint, config: Any, *, device: Any, dtype: str) -> Any:
    """This project's class where it has one, else the stock one. Raises UsageError.

    ``dtype`` is one of torch's names, or auto.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from mini_llm.models import ARCHITECTURES, load_trained
    from mini_llm.models import load_model as load_ours

    disable_progress_bar()
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    is_ours = config.model_type in ARCHITECTURES
    load = load_ours if is_ours else AutoModelForCausalLM.from_pretrained
    try:
        model: Any = load_trained(load, checkpoint.where, dtype=wanted)
    except (OSError, ValueError) as error:
        raise UsageError(_not_there(checkpoint, error)) from None
    return model.to(device).eval()


def is_ours(model: Any) -> bool:
    """Whether the class is this project's, which keeps the documents of a packed row apart."""
    from mini_llm.models.common.base import MiniPreTrainedModel

    return isinstance(model, MiniPreTrainedModel)


def weights_fingerprint(checkpoint: Checkpoint, config: Any) -> str:
    """sha256 of the weight files' contents, in the order of their names; of the hub its commit."""
    folder = Path(checkpoint.where)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None) or "")
    digest = hashlib.sha256()
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin")]
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else ""


def longest_input(config: Any) -> int | None:
    """The most tokens that the model was made for, None where its config does not say."""
    text_config = config.get_text_config()
    for field in ("max_position_embeddings", "n_positions", "n_ctx"):
        value = getattr(text_config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def manifest_of(path: Any) -> dict[str, Any]:
    """The manifest of a prepared local folder; {} where there is none."""
    file = Path(path) / "manifest.json" if isinstance(path, str) else None
    if file is None or not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}  # whoever opens the data says what is wrong with it
    return content if isinstance(content, dict) else {}
