"""Names on the command line of the benchmark, apart so that --help need not wait for torch."""

ENGINES = ["none", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
# The loops beside the recipe's, and what a table calls them.
PEERS = {
    "bare": "bare PyTorch loop, this project's class",
    "bare_stock": "bare PyTorch loop, stock class",
    "trainer": "HF Trainer, stock class",
    "trainer_fast": "HF Trainer, stock class, torch_compile and use_liger_kernel",
    "accelerate": "stock Accelerate + DeepSpeed, this project's class",
    "accelerate_stock": "stock Accelerate + DeepSpeed, stock class",
}
