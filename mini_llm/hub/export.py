"""Writing a trained model as a stock transformers directory."""

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import GenerationConfig

from mini_llm.data.tokenizer import IM_END
from mini_llm.parallel.expert_parallel import stock_state_dict

from .model_card import write_card


def save_stock_checkpoint(
    accelerator: Accelerator, model: nn.Module, tokenizer: Any, folder: Path
) -> None:
    """Write weights, config, generation config and tokenizer that plain transformers opens.

    Every rank calls it (ZeRO-3 gathers the weights); rank 0 writes.
    """
    state_dict = stock_state_dict(accelerator, model)
    if accelerator.is_main_process:
        write_stock_checkpoint(accelerator.unwrap_model(model), tokenizer, state_dict, folder)


def write_stock_checkpoint(
    model: Any, tokenizer: Any, state_dict: dict[str, torch.Tensor], folder: Path
) -> None:
    """The same from a ``state_dict`` that :func:`stock_state_dict` copied; empties it.

    Of ``model``, which may be training, only the config and the names are read.
    """
    if model.config.tie_word_embeddings:
        # The copies no longer share memory: save_pretrained would write the weight twice.
        for tied_key in model._tied_weights_keys:
            state_dict.pop(tied_key, None)
    for name, value in state_dict.items():
        state_dict[name] = value.cpu()
    model.save_pretrained(folder, state_dict=state_dict, is_main_process=True)
    state_dict.clear()
    tokenizer.save_pretrained(folder)


def base_generation_config(tokenizer: Any) -> GenerationConfig:
    """How a base model generates: sampling, until ``<|endoftext|>``."""
    return GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def chat_generation_config(tokenizer: Any) -> GenerationConfig:
    """How a chat model generates: sampling, until ``<|im_end|>`` or ``<|endoftext|>``.

    Raises ValueError, naming --tokenizer, for a tokenizer without ``<|im_end|>``.
    """
    if IM_END not in tokenizer.get_vocab():
        raise ValueError(
            f"--tokenizer: {tokenizer.name_or_path} has no {IM_END} token, at which a chat model "
            "stops; give one that data_tools/train_tokenizer.py made"
        )
    config = base_generation_config(tokenizer)
    config.eos_token_id = [tokenizer.convert_tokens_to_ids(IM_END), tokenizer.eos_token_id]
    return config


def save_final(accelerator: Accelerator, model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """``final/`` in a run's folder: stock checkpoint and model card; complete or absent."""
    aside = folder.with_name(f".{folder.name}.partial")
    save_stock_checkpoint(accelerator, model, tokenizer, aside)
    if accelerator.is_main_process:
        write_card(aside, folder.parent)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    accelerator.wait_for_everyone()
