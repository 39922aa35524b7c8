"""The gradient of one optimizer step of fine-tuning, computed in three ways, under an engine.

``accelerate launch sft_gradients.py FILE``, JSON: a list of {model, data, tokenizer, seq_len, out,
port}. For each, in a process of its own (see several_runs.py), the step's conversations are
computed packed, padded (a conversation a row) and one by one, with the pieces that recipes/sft.py
is made of. Rank 0 writes every gradient, every rank which experts its packed rows chose.
"""

# ruff: noqa: E402
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mini_llm.parallel.environment import prepare_environment, rank, world_size

prepare_environment()

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad

from mini_llm.data import collate, one_document_per_row, open_sft_stream
from mini_llm.models import load_model
from mini_llm.parallel import engine
from mini_llm.training.balancing import find_routers
from mini_llm.training.losses import combine_losses, mtp_options
from mini_llm.training.optimizer import build_optimizer

ROWS = 8  # of the step, over all ranks
ROWS_PER_PASS = 2
MTP_WEIGHT = 0.3


def micro_batches(rows: list[Any], way: str) -> list[list[Any]]:
    """This rank's rows of the step as micro-batches of (computed) rows."""
    passes = [rows[i : i + ROWS_PER_PASS] for i in range(0, len(rows), ROWS_PER_PASS)]
    if way == "packed":
        return passes
    if way == "padded":
        return [one_document_per_row(part) for part in passes]
    conversations = [row for part in passes for row in one_document_per_row(part)]
    return [one_document_per_row([row]) for row in conversations]


def padding_like(rows: list[Any]) -> list[Any]:
    """A row without a conversation, for ranks that have fewer micro-batches than others."""
    return [rows[0] | {"doc_lens": np.zeros(0, np.int32)}]


def chosen_experts(model: torch.nn.Module) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Watch the routers: (layer, its choices so far) of each; the lists fill as the model runs."""
    for layer, router in find_routers(model).items():
        choices: list[torch.Tensor] = []
        router.register_forward_hook(lambda m, i, out, to=choices: to.append(out[2].cpu()))
        yield str(layer), choices


def compute(item: dict[str, Any]) -> None:
    """Compute the step in every way and write what came out."""
    accelerator = engine.build_accelerator(micro_batch_size=ROWS_PER_PASS, max_grad_norm=0.0)
    stream = open_sft_stream(
        {"tiny": {"path": item["data"]}},
        seq_len=item["seq_len"],
        seed=0,
        rows_per_step=ROWS,
        rank=rank(),
        world_size=world_size(),
        tokenizer=item["tokenizer"],
    )
    rows = [next(stream) for _ in range(ROWS // world_size())]
    stream.close()
    model = load_model(item["model"], dtype=torch.float32)
    options = mtp_options(model, weight=MTP_WEIGHT)
    # Steps of no length: every way meets the same weights.
    optimizer = build_optimizer(
        model, learning_rate=0.0, weight_decay=0.0, betas=(0.9, 0.95), epsilon=1e-8
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    assert engine.zero_stage(accelerator, model) == 2
    choices = dict(chosen_experts(model)) if "deepseek" in item["model"] else {}
    model.train()
    out = Path(item["out"])
    for way in ("packed", "padded", "one_by_one"):
        batches = micro_batches(rows, way)
        count = torch.tensor([len(batches)])
        most = int(accelerator.gather(count).max())
        batches += [padding_like(batches[0])] * (most - len(batches))
        tensors = [collate(batch, accelerator.device) for batch in batches]
        targets = torch.tensor([float(sum(batch["num_target_tokens"] for batch in tensors))])
        targets = accelerator.reduce(targets, "sum")
        for i, batch in enumerate(tensors):
            with engine.accumulate(model, last=i == len(tensors) - 1):
                outputs = model(
                    input_ids=batch["input_ids"],
                    position_ids=batch["position_ids"],
                    labels=batch["labels"],
                    num_items_in_batch=targets[0],
                    num_target_tokens=batch["num_target_tokens"],
                    use_cache=False,
                    **options,
                )
                loss, _ = combine_losses(
                    outputs, mtp_weight=MTP_WEIGHT, balance_weight=0.0, micro_batches=1
                )
                engine.backward(accelerator, model, loss)
        if way == "packed":
            torch.save(choices, out / f"experts-{rank()}.pt")
        gradients = {}
        for name, parameter in accelerator.unwrap_model(model).named_parameters():
            gradient = safe_get_full_grad(parameter)
            if accelerator.is_main_process:
                gradients[name] = gradient.clone()
        if accelerator.is_main_process:
            torch.save(
                {"gradients": gradients, "targets": float(targets), "passes": len(tensors)},
                out / f"{way}.pt",
            )
        engine.optimizer_step(model, optimizer, 0.0)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    for item in json.loads(Path(sys.argv[1]).read_text()):
        child = os.fork()
        if child == 0:
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            os.environ["MASTER_PORT"] = str(item["port"])
            try:
                compute(item)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(f"rank {os.environ.get('RANK', '0')} failed with {item}")
