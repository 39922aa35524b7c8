"""The architectures of mini-llm: one folder and one line in the table below for each.

``models/README.md`` is the checklist for adding one. Nothing outside this package names a concrete
architecture: recipes ask :func:`build_model` or :func:`load_model`.
"""

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# config.json's ``model_type`` -> the folder that implements it.
ARCHITECTURES = {
    "llama": "mini_llm.models.llama3",
    "deepseek_v3": "mini_llm.models.deepseekv3",
    "qwen3_next": "mini_llm.models.qwen3_next",
}


def _architectures() -> list[ModuleType]:
    return [import_module(module) for module in ARCHITECTURES.values()]


def list_models() -> list[str]:
    """Names of all presets, e.g. ``["mini_llama3", "mini_llama3_tiny"]``."""
    return [name for architecture in _architectures() for name in architecture.PRESETS]


def _architecture_of_preset(name: str) -> ModuleType:
    for architecture in _architectures():
        if name in architecture.PRESETS:
            return architecture
    raise ValueError(f"--model: no preset is named {name!r}; choose one of {list_models()}")


def preset_config(name: str, **overrides: Any) -> "PreTrainedConfig":
    """The config of preset ``name``, fields in ``overrides`` replaced.

    Raises ValueError for an unknown preset, an override that is not a field of its config, or
    values that the config refuses.
    """
    from huggingface_hub.errors import StrictDataclassError

    architecture = _architecture_of_preset(name)
    config_class = architecture.config_class()
    fields = {**architecture.PRESETS[name], **overrides}
    known = set(config_class().to_dict()) | set(fields) - set(overrides)
    for field in overrides:
        if field not in known:
            raise ValueError(
                f"--model_overrides: {field!r} is not a field of {config_class.__name__}"
            )
    try:
        return config_class(**fields)
    except StrictDataclassError as error:
        raise ValueError(f"--model_overrides: {error.__cause__ or error}") from error
    except ZeroDivisionError as error:
        raise ValueError(f"--model_overrides: a size cannot be 0 ({error})") from error


def build_model(name: str, **config_overrides: Any) -> "PreTrainedModel":
    """A randomly initialised model of preset ``name`` (fp32, on the CPU).

    The weights depend on torch's global seed alone. Raises ValueError like :func:`preset_config`.
    """
    config = preset_config(name, **config_overrides)
    return _architecture_of_preset(name).model_class()(config)


def empty_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """A model of ``config``, one of ours, without memory for its weights: names and shapes only."""
    import torch

    with torch.device("meta"):
        model: PreTrainedModel = import_module(ARCHITECTURES[config.model_type]).model_class()(
            config
        )
    return model


def load_model(path: str | Path, **kwargs: Any) -> "PreTrainedModel":
    """This project's class for a checkpoint: one of ours, a stock transformers folder or a hub id.

    ``kwargs`` go to ``from_pretrained`` (``dtype``, ``attn_implementation``, …). Raises ValueError
    when the checkpoint's ``model_type`` is none of ours.
    """
    from transformers import PreTrainedConfig

    fields, _ = PreTrainedConfig.get_config_dict(str(path))
    model_type = fields.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"{path}: model_type {model_type!r} is not one of {sorted(ARCHITECTURES)}, "
            "so mini_llm has no class for it"
        )
    model_class = import_module(ARCHITECTURES[model_type]).model_class()
    model: PreTrainedModel = model_class.from_pretrained(path, **kwargs)
    return model


def load_trained(load: Callable[..., Any], path: str | Path, **kwargs: Any) -> Any:
    """What ``load`` makes of a checkpoint to use as it is: every weight must be in it.

    ``load`` is :func:`load_model` or a ``from_pretrained``. transformers fills a weight that is
    missing or of another size at random. Raises ValueError for such a checkpoint, and for weights
    that cannot be read, besides what ``load`` raises.
    """
    from safetensors import SafetensorError

    again = "copy or download the checkpoint again"
    try:
        model, info = load(path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"its weights cannot be read: {error}; {again}") from error
    missing = sorted(key for key in info["missing_keys"] if not _predicts_further(key, model))
    if missing:
        raise ValueError(f"{len(missing)} weight(s) are missing, the first {missing[0]}; {again}")
    if info["mismatched_keys"]:
        key, theirs, wanted = min(info["mismatched_keys"])
        raise ValueError(
            f"{key} is {tuple(theirs)} and by config.json {tuple(wanted)}; put the config.json "
            "there that the weights were saved with"
        )
    return model


def _predicts_further(key: str, model: Any) -> bool:
    """Whether the weight is of a layer behind the decoder's (MTP): the next token needs none."""
    layer = re.match(r"(?:model\.)?layers\.(\d+)\.", key)
    return layer is not None and int(layer[1]) >= model.config.get_text_config().num_hidden_layers


def mixing_flops_per_token(config: "PreTrainedConfig", seq_len: int) -> float:
    """Training FLOPs a token of what mixes tokens (attention, delta rule), all layers together."""
    architecture = import_module(ARCHITECTURES[config.model_type])
    flops: float = architecture.mixing_flops_per_token(config, seq_len)
    return flops


def kernels_in_use(
    config: "PreTrainedConfig", *, device_type: str, half_precision: bool, compiled: bool
) -> dict[str, str]:
    """What computes the parts that have a choice, e.g. ``{"delta_rule": "fla"}``.

    ``compiled``: the layers are.
    """
    import torch

    from .common.attention import why_no_varlen_kernel
    from .common.triton import missing_for_triton

    packed, loss = "", "chunked linear cross-entropy"
    if config._attn_implementation == "sdpa" and device_type == "cpu":
        packed = " (packed rows: one call a document)"
    elif config._attn_implementation == "sdpa":
        dtype = torch.bfloat16 if half_precision else torch.float32
        why_not = why_no_varlen_kernel(config, torch.device(device_type), dtype)
        kernel = f"block-diagonal mask, for {why_not}" if why_not else "varlen_attn"
        packed = f" (packed rows: {kernel})"
    if device_type == "cuda":
        missing = missing_for_triton()
        loss += f", not compiled: that needs {missing}" if missing else ", compiled"
    kernels = {"attention": f"{config._attn_implementation}{packed}", "loss": loss}
    if getattr(config, "n_routed_experts", 0) or getattr(config, "num_experts", 0):
        theirs = config._experts_implementation
        if theirs is None and compiled and not half_precision:
            theirs = "grouped_mm"  # see common/experts.py
        kernels["experts"] = f"transformers' {theirs}" if theirs else "grouped_mm"
    architecture = import_module(ARCHITECTURES[config.model_type])
    if hasattr(architecture, "kernels_in_use"):
        kernels |= architecture.kernels_in_use(half_precision, device_type=device_type)
    return kernels


def is_checkpoint(model: str) -> bool:
    """Whether ``--model`` names a checkpoint (folder or hub id) rather than a preset."""
    return model not in list_models() and (
        Path(model, "config.json").is_file() or model.count("/") == 1
    )


def pretrained_folder(model: str, *, flag: str = "--model") -> Path:
    """The local folder of the checkpoint that ``flag`` names; a hub id is downloaded once.

    Raises ValueError for a preset, which has no trained weights, and for what cannot be had.
    """
    if model in list_models():
        raise ValueError(
            f"{flag}: {model} is a preset without trained weights; give the final/ folder of a "
            "pretraining run, or a hub id"
        )
    folder = Path(model)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or model.count("/") != 1:
        raise ValueError(
            f"{flag}: {model} is no folder with a config.json; give the final/ folder of a "
            "pretraining run (recipes/pretrain.py), or a hub id"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{flag}: {model} is no local folder and cannot be had from the hub "
            f"({why_not_from_hub(error)}); check the name, HF_ENDPOINT and, for a private model, "
            "HF_TOKEN"
        ) from error


def why_not_from_hub(error: Exception) -> str:
    """A clause that says why the hub's client gave no model.

    Its own texts are paragraphs of advice for programmers.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):
        return "it has no such model, or shows it to others alone"
    if isinstance(error, LocalEntryNotFoundError):
        return "it is not cached, and the hub cannot be asked"
    return " ".join(str(error).split())[:300]


def check_preset(name: str, overrides: Mapping[str, Any]) -> "PreTrainedConfig":
    """The config of a preset and ``overrides`` that make a model. Raises ValueError for others."""
    config = preset_config(name, **overrides)
    _check_kernels(config.model_type)
    try:
        empty_model(config)
    except ValueError as error:
        raise ValueError(f"--model_overrides: {error}") from error
    except (RuntimeError, KeyError, ZeroDivisionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"--model_overrides make no model ({why})") from error
    return config


def check_model(model: str, overrides: Mapping[str, Any] | None = None) -> None:
    """Refuse, before anything is built, a ``--model`` that cannot train.

    Raises ValueError for what is neither a preset nor a checkpoint, for a checkpoint of another
    architecture, and for ``overrides`` (``--model_overrides``) that make no model of the preset, or
    would change a checkpoint.
    """
    from difflib import get_close_matches

    overrides = overrides or {}
    if model in list_models():
        config = check_preset(model, overrides)
        if "full_attention" not in (getattr(config, "layer_types", None) or ["full_attention"]):
            # It would train until its first sample.
            raise ValueError(
                "--model_overrides: no layer has full attention (see layer_types), and "
                "transformers generates with a cache only where one has; give more "
                "num_hidden_layers, or a smaller full_attention_interval"
            )
        return
    if is_checkpoint(model):
        fields = _config_fields(model)
        model_type = fields.get("model_type")
        if model_type not in ARCHITECTURES:
            raise ValueError(
                f"--model: {model} holds model_type {model_type!r}; mini_llm trains "
                f"{sorted(ARCHITECTURES)}"
            )
        _check_kernels(str(model_type))
        changed = [name for name, value in overrides.items() if fields.get(name) != value]
        if changed:
            raise ValueError(
                f"--model_overrides: {changed[0]} is {overrides[changed[0]]!r} there and "
                f"{fields.get(changed[0])!r} in the checkpoint {model}, which keeps its config; "
                "leave it out, or give a preset as --model"
            )
        return
    near = get_close_matches(model, list_models(), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"--model: {model!r} is neither a preset nor a folder with a config.json; {hint}"
        f"the presets are {', '.join(list_models())}"
    )


def _check_kernels(model_type: str) -> None:
    """Look for an architecture's optional kernels; raises ValueError for broken ones."""
    architecture = import_module(ARCHITECTURES[model_type])
    if hasattr(architecture, "kernels_in_use"):
        architecture.kernels_in_use()


def check_vocabulary(model: str, size: int) -> None:
    """Refuse a checkpoint ``model`` with another vocabulary than the tokenizer's. ValueError."""
    if not is_checkpoint(model):
        return
    theirs = _config_fields(model).get("vocab_size")
    if theirs != size:
        raise ValueError(
            f"--tokenizer has {size} entries but --model {model} has {theirs}; give the tokenizer "
            "that the checkpoint came with"
        )


def _config_fields(checkpoint: str) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    fields, _ = PreTrainedConfig.get_config_dict(checkpoint)
    return fields
