"""A toy architecture, as models/README.md says to add one: Llama plus norms on queries and keys."""

from ..llama3 import PRESETS as LLAMA3
from ..llama3 import mixing_flops_per_token as mixing_flops_per_token

PRESETS = {"toy_tiny": {**LLAMA3["mini_llama3_tiny"], "num_hidden_layers": 2}}


def config_class() -> type:
    """The stock config class."""
    from transformers import Qwen3Config

    return Qwen3Config


def model_class() -> type:
    """The class that trains and loads this architecture."""
    from .modeling import ToyForCausalLM

    return ToyForCausalLM
