"""mini-llm: pretrain and fine-tune small reproductions of mainstream LLM architectures.

The public functions are imported on first use, so that ``import mini_llm`` (and ``--help``)
does not pay for importing torch and transformers.
"""

from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "list_models": "mini_llm.models",
    "build_model": "mini_llm.models",
    "load_model": "mini_llm.models",
    "MiniDeepseekV3Model": "mini_llm.models.deepseekv3.modeling",
    "MiniDeepseekV3ForCausalLM": "mini_llm.models.deepseekv3.modeling",
    "MiniLlama3Model": "mini_llm.models.llama3.modeling",
    "MiniLlama3ForCausalLM": "mini_llm.models.llama3.modeling",
    "MiniQwen3NextModel": "mini_llm.models.qwen3_next.modeling",
    "MiniQwen3NextForCausalLM": "mini_llm.models.qwen3_next.modeling",
}

__all__ = [
    "MiniDeepseekV3ForCausalLM",
    "MiniDeepseekV3Model",
    "MiniLlama3ForCausalLM",
    "MiniLlama3Model",
    "MiniQwen3NextForCausalLM",
    "MiniQwen3NextModel",
    "__version__",
    "build_model",
    "list_models",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mini_llm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
