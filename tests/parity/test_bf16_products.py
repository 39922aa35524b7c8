"""Which matrix products of a bf16 run are computed in bf16: by dtype, not by time."""

import pytest
import torch

from mini_llm import build_model
from mini_llm.bench.operators import Operators
from tests.conftest import TINY_MODELS


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "deepspeed"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_all_products_of_a_bf16_run_but_the_routers_are_in_bf16(name, weights):
    torch.manual_seed(0)
    model = build_model(name, vocab_size=320).to(weights).train()
    tokens = torch.randint(320, (2, 130))
    positions = torch.cat([torch.arange(100), torch.arange(30)]).expand(2, -1)  # two documents
    with Operators() as seen:
        # A run without DeepSpeed has fp32 weights and autocast, one with it has bf16 weights.
        with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
            output = model(tokens, position_ids=positions, labels=tokens, use_cache=False)
        output.loss.backward()
    routers = sum(hasattr(module, "tokens_per_expert") for module in model.modules())
    products = seen.product_dtypes
    assert products["_grouped_mm", torch.bfloat16] >= 6 * routers
    assert products["mm", torch.bfloat16] > 0
    if name == "mini_qwen3_next_tiny":
        assert products["bmm", torch.bfloat16] >= 3 * 8  # delta nets, forward and backward
    # A router's choice is made in fp32 (forward, and the gradients of its input and its weight);
    # two products are the gradient of the inverse in a delta net.
    delta_nets = getattr(model.config, "layer_types", []).count("linear_attention")
    in_fp32 = {product: n for (product, dtype), n in products.items() if dtype == torch.float32}
    assert in_fp32.pop("bmm", 0) <= 2 * delta_nets
    assert in_fp32.pop("mm", 0) <= 3 * routers
    assert not in_fp32
