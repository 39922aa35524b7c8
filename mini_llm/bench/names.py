"""What the benchmark's command line knows, apart so that --help need not wait for torch."""

PRESETS = ["mini_llama3", "mini_deepseekv3", "mini_qwen3_next"]
TINY_PRESETS = [f"{preset}_tiny" for preset in PRESETS]
ENGINES = ["none", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
# The loops beside the recipe's, and what a table calls them.
PEERS = {
    "bare": "bare PyTorch loop, this project's class",
    "bare_stock": "bare PyTorch loop, stock class",
    "trainer": "HF Trainer, stock class",
    "trainer_compile": "HF Trainer, stock class, torch_compile",
    "trainer_fast": "HF Trainer, stock class, torch_compile and use_liger_kernel",
    "accelerate": "stock Accelerate + DeepSpeed, this project's class",
    "accelerate_stock": "stock Accelerate + DeepSpeed, stock class",
}
PARTS = {
    "loss": "the LM head and its loss, and with all logits at once",
    "sft_loss": "the same where 3 of 5 positions are supervised, and computing them all",
    "moe": "a layer's experts, and by transformers",
    "delta_net": "the gated delta rule, and by transformers",
    "optimizer": "AdamW's update, fused and by single operations",
    "model": "forward and backward of a whole model, and of transformers' class",
}


class BenchmarkError(RuntimeError):
    """What was measured cannot stand in a table: it failed, or compared things that differ."""
