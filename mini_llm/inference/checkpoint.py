"""Opening a checkpoint to generate with: a run's, any stock one, or one of the hub."""

from pathlib import Path
from typing import Any

from .generator import Generator


def open_generator(checkpoint: str, *, device: str = "auto", dtype: str = "") -> Generator:
    """The Generator of a run folder, its final/, a checkpoints/step-N, a stock folder or a hub id.

    ``device`` is by default the first GPU, else the CPU; ``dtype`` (float32, bfloat16, float16) to
    the checkpoint's own on a GPU and float32 on a CPU. Raises ValueError, in one sentence, for what
    cannot be opened.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
    from transformers.utils.logging import disable_progress_bar

    from mini_llm.device import choose_device
    from mini_llm.models import ARCHITECTURES, load_model, load_trained

    folder = find_checkpoint(checkpoint)
    place = choose_device(device)
    chosen = getattr(torch, dtype) if dtype else "auto" if place.type != "cpu" else torch.float32
    disable_progress_bar()
    try:
        fields, _ = PreTrainedConfig.get_config_dict(folder)
        ours = fields.get("model_type") in ARCHITECTURES
        load = load_model if ours else AutoModelForCausalLM.from_pretrained
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = load_trained(load, folder, dtype=chosen)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"CKPT: {folder} cannot be opened ({' '.join(str(error).split())})") from (
            error
        )
    if len(tokenizer) > fields.get("vocab_size", len(tokenizer)):
        raise ValueError(
            f"CKPT: the tokenizer in {folder} has {len(tokenizer)} entries, the model only "
            f"{fields['vocab_size']}; put the tokenizer there that it was trained with"
        )
    return Generator(model.to(place), tokenizer)


def find_checkpoint(checkpoint: str) -> Path:
    """The folder with config.json and weights; a hub id is downloaded once.

    Raises ValueError for what is neither.
    """
    from mini_llm.hub.push import find_source
    from mini_llm.models import pretrained_folder

    if Path(checkpoint).exists():
        return find_source(Path(checkpoint)).weights
    return pretrained_folder(checkpoint, flag="CKPT")


def chat_prompt(
    generator: Generator, messages: list[dict[str, str]], think: bool | None = None
) -> list[int]:
    """The tokens of a conversation, up to where the answer begins.

    ``think`` True or False opens or skips the thoughts, None leaves it to the model (and to a
    template that knows none). Raises ValueError where the template refuses the messages.
    """
    from jinja2.exceptions import TemplateError

    extra = {} if think is None else {"enable_thinking": think}
    try:
        return list(
            generator.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, **extra
            )
        )
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error
