"""Writing a trained model as a GGUF file for llama.cpp; ``python -m mini_llm.hub export`` calls it.

What is peculiar to an architecture stands in its folder's ``gguf_export.py``; names of fields and
tensors are those of the ``gguf`` library.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .push import Source, find_source

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

# --dtype -> the names that gguf has for the matrices' type and for a file of such.
DTYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
DEFAULT_DTYPE = "f16"
# llama.cpp's name for the pre-tokenizer of mini_llm/data/tokenizer.py, which is Qwen2's.
PRETOKENIZER = "qwen2"


@dataclass(frozen=True)
class Exported:
    """What was written: ``kept_f16`` are matrices whose rows q8_0 cannot hold, kept in f16."""

    path: Path
    architecture: str
    tensors: int
    kept_f16: int


def export_gguf(directory: Path, output: Path, dtype: str = DEFAULT_DTYPE) -> Exported:
    """Write the model that :func:`~.push.find_source` finds in ``directory`` as ``output``.

    One file with the weights, in ``dtype`` (a key of DTYPES; norms, biases and what routes tokens
    to experts stay fp32), tokenizer, chat template and sampling settings; whole or absent. Raises
    ValueError for what llama.cpp cannot run, naming it, and for weights that ``dtype`` cannot hold.
    """
    if output.suffix != ".gguf":
        raise ValueError(f"--output {output} is no name of a GGUF file; let it end in .gguf")
    if find_spec("gguf") is None:
        raise ValueError("the package gguf is not installed; run pip install 'mini_llm[gguf]'")
    source = find_source(directory)
    config, architecture = _config_and_architecture(source.weights)
    tokenizer, added = _tokenizer(source.weights, config.vocab_size)

    from gguf import MODEL_ARCH_NAMES, GGUFWriter

    writer = GGUFWriter(None, MODEL_ARCH_NAMES[architecture.ARCHITECTURE])
    _add_origin(writer, source, dtype)
    _add_sizes(writer, config)
    architecture.add_fields(writer, config)
    _add_tokenizer(writer, source.weights, tokenizer, added)
    count = kept_f16 = 0
    for name, weight, stays_fp32 in _tensors(source.weights, architecture):
        data, kind = _encode(name, weight.numpy(), "f32" if stays_fp32 else dtype)
        writer.add_tensor(name, data, raw_dtype=kind)
        count += 1
        kept_f16 += dtype == "q8_0" and kind.name == "F16"
    _write(writer, output)
    return Exported(output, writer.arch, count, kept_f16)


def _config_and_architecture(weights: Path) -> tuple["PreTrainedConfig", Any]:
    """The checkpoint's config and its architecture's ``gguf_export``; ValueError if it has none."""
    from mini_llm.models import ARCHITECTURES

    model_type = json.loads((weights / "config.json").read_text()).get("model_type")
    folder = ARCHITECTURES.get(model_type)
    module = f"{folder}.gguf_export"
    if folder is None or find_spec(module) is None:
        raise ValueError(f"{weights}: there is no export to GGUF for model_type {model_type!r}")
    architecture = import_module(module)
    config = import_module(folder).config_class().from_pretrained(weights)
    rope_type = config.rope_parameters.get("rope_type", "default")
    reason: str | None
    if rope_type != "default":
        reason = f"its rope_type {rope_type!r} has no export, only 'default' has"
    elif config.hidden_act != "silu":
        reason = f"llama.cpp has silu in it, and its hidden_act is {config.hidden_act!r}"
    else:
        reason = architecture.obstacle(config)
    if reason is not None:
        raise ValueError(f"{weights} cannot be exported to GGUF: {reason}")
    return config, architecture


def _tokenizer(
    weights: Path, vocab_size: int
) -> tuple["PreTrainedTokenizerFast", dict[int, dict[str, Any]]]:
    """The checkpoint's tokenizer and its added tokens by id.

    ValueError where llama.cpp would give other ids.
    """
    from mini_llm.data.tokenizer import load_tokenizer, read_tokenizer_json, why_another_kind

    content = read_tokenizer_json(weights)
    tokenizer = load_tokenizer(weights)
    reason = why_another_kind(content)
    if reason is None and tokenizer("")["input_ids"]:
        reason = "it puts tokens around every text"
    if reason is None and len(tokenizer) != vocab_size:
        reason = f"it has {len(tokenizer)} entries, the model {vocab_size}"
    if reason is not None:
        raise ValueError(
            f"{weights / 'tokenizer.json'} cannot be exported to GGUF ({reason}); only a tokenizer "
            "of data_tools/train_tokenizer.py can, which llama.cpp splits text for as for Qwen2's"
        )
    return tokenizer, {token["id"]: token for token in content["added_tokens"]}


def _add_origin(writer: "GGUFWriter", source: Source, dtype: str) -> None:
    """Name and licence, as far as the run's folder has them, and the type of file."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    from .model_card import UNKNOWN_LICENSE

    folder = source.run or source.weights
    settings: dict[str, Any] = {}
    if source.run is not None:
        settings = yaml.safe_load((source.run / "config.yaml").read_text())
    writer.add_type("model")
    writer.add_name(settings.get("run_name") or folder.name)
    if settings.get("hub_license", UNKNOWN_LICENSE) != UNKNOWN_LICENSE:
        writer.add_license(settings["hub_license"])
    writer.add_file_type(LlamaFileType[DTYPES[dtype][1]])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_sizes(writer: "GGUFWriter", config: "PreTrainedConfig") -> None:
    """The sizes that every architecture has."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_tokenizer(
    writer: "GGUFWriter",
    weights: Path,
    tokenizer: "PreTrainedTokenizerFast",
    added: dict[int, dict[str, Any]],
) -> None:
    """Tokens, merges, special ids, chat template, and how the model samples."""
    from gguf import TokenType
    from transformers import GenerationConfig

    from mini_llm.data.tokenizer import IM_END, read_tokenizer_json

    generation = GenerationConfig()
    if (weights / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(weights)
    types = [
        TokenType.NORMAL
        if token_id not in added
        else TokenType.CONTROL
        if added[token_id]["special"]
        else TokenType.USER_DEFINED
        for token_id in range(len(tokenizer))
    ]
    writer.add_tokenizer_model("gpt2")  # what llama.cpp calls byte-level BPE
    writer.add_tokenizer_pre(PRETOKENIZER)
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types(types)
    merges = read_tokenizer_json(weights)["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])

    ends = generation.eos_token_id or tokenizer.eos_token_id
    writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)
    if IM_END in tokenizer.get_vocab():
        writer.add_eot_token_id(tokenizer.convert_tokens_to_ids(IM_END))
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    # Nothing stands before a text; the token that ends a document is the nearest to it, and
    # without the field llama.cpp would take id 11.
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(template_for_llama_cpp(tokenizer.chat_template))
    if generation.do_sample and generation.temperature is not None:
        writer.add_sampling_temp(generation.temperature)
    if generation.do_sample and generation.top_p is not None:
        writer.add_sampling_top_p(generation.top_p)


def template_for_llama_cpp(template: str) -> str:
    """The chat template without ``{% generation %}``, which only training reads.

    A comment in its place takes the same white space away. And llama.cpp always says whether to
    think, by default yes: yes becomes what saying nothing is to transformers, the model's choice.
    """
    template = re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", template)
    return template.replace(
        "if enable_thinking is defined -%}",
        "if enable_thinking is defined and not enable_thinking -%}",
    )


def _tensors(weights: Path, architecture: Any) -> Iterator[tuple[str, "torch.Tensor", bool]]:
    """(llama.cpp's name, fp32 weight, whether llama.cpp needs it in fp32) of every tensor."""
    import torch
    from gguf import MODEL_TENSOR, get_tensor_name_map
    from transformers.utils.logging import disable_progress_bar

    from mini_llm.models import load_model

    disable_progress_bar()
    model = load_model(weights, dtype=torch.float32)
    config = model.config
    names = get_tensor_name_map(architecture.ARCHITECTURE, config.num_hidden_layers)
    # Routers choose by small differences; the convolution's kernel takes no other type.
    exact = {MODEL_TENSOR.FFN_GATE_INP, MODEL_TENSOR.SSM_CONV1D}
    for stock_key, stock_weight in model.state_dict().items():
        if stock_key == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding
        for stacked_key, stacked in architecture.tensors(config, stock_key, stock_weight):
            for key, weight in _unstacked(stacked_key, stacked):
                found = names.get_type_and_name(key, try_suffixes=(".weight", ".bias"))
                if found is None:
                    raise ValueError(
                        f"{weights} cannot be exported to GGUF: llama.cpp's "
                        f"{architecture.ARCHITECTURE.name.lower()} has no tensor for {stock_key}"
                    )
                kind, name = found
                yield name, weight.contiguous(), weight.ndim == 1 or kind in exact


def _unstacked(key: str, weight: "torch.Tensor") -> Iterator[tuple[str, "torch.Tensor"]]:
    """The experts' matrices under the keys that gguf's table has, gate and up apart."""
    if key.endswith(".experts.gate_up_proj"):
        gate, up = weight.chunk(2, dim=1)
        yield key.replace("gate_up_proj", "gate_proj.weight"), gate
        yield key.replace("gate_up_proj", "up_proj.weight"), up
    elif key.endswith(".experts.down_proj"):
        yield f"{key}.weight", weight
    else:
        yield key, weight


def _encode(name: str, weight: Any, dtype: str) -> tuple[Any, "GGMLQuantizationType"]:
    """The bytes of a weight (fp32 array) and their type; ValueError where it cannot hold them."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize

    kind = GGMLQuantizationType[DTYPES[dtype][0]]
    if weight.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = GGMLQuantizationType.F16
    largest = float(np.abs(weight).max())
    limit = float(np.finfo(np.float32 if kind.name in ("F32", "BF16") else np.float16).max)
    if not largest <= limit:  # also for NaN
        raise ValueError(
            f"--dtype {dtype} cannot hold {name}, whose largest value is {largest:g}"
            + ("; give bf16 or f32" if np.isfinite(largest) else ": the training went wrong")
        )
    return quantize(weight, kind), kind


def _write(writer: "GGUFWriter", output: Path) -> None:
    aside = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            writer.write_header_to_file(aside)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            os.replace(aside, output)
        finally:
            writer.close()
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written ({error.strerror})") from error
