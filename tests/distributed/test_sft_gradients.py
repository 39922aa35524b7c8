"""One step of fine-tuning has one gradient: packed, padded or one by one, on one rank or two."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_llm.data import IGNORE_INDEX, one_document_per_row, open_sft_stream
from mini_llm.models import load_model
from mini_llm.training.balancing import find_routers
from tests.conftest import TINY_MODELS, TinyConversations
from tests.distributed.sft_gradients import MTP_WEIGHT, ROWS
from tests.launching import REPOSITORY, launch_command, launch_environment, launch_port

WAYS = ("packed", "padded", "one_by_one")
RANKS = (1, 2)


@pytest.fixture(scope="module")
def gradients(
    tiny_conversations: TinyConversations, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What sft_gradients.py wrote under ZeRO-2, in a folder for every number of ranks and model."""
    folder = tmp_path_factory.mktemp("gradients")
    for ranks in RANKS:
        items = []
        for name, model in tiny_conversations.models.items():
            out = folder / str(ranks) / name
            out.mkdir(parents=True)
            items.append(
                {
                    "model": str(model),
                    "data": str(tiny_conversations.packed),
                    "tokenizer": str(tiny_conversations.tokenizer),
                    "seq_len": tiny_conversations.seq_len,
                    "out": str(out),
                    "port": launch_port(),
                }
            )
        plan = folder / f"plan-{ranks}.json"
        plan.write_text(json.dumps(items))
        *launcher, _ = launch_command(config="zero2", processes=ranks)
        done = subprocess.run(
            [*launcher, str(REPOSITORY / "tests/distributed/sft_gradients.py"), str(plan)],
            cwd=REPOSITORY,
            env=launch_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout
    return folder


def rows_of_the_step(data: TinyConversations, rank: int = 0, world_size: int = 1) -> list[Any]:
    """The packed rows that sft_gradients.py computes on this rank."""
    with open_sft_stream(
        {"tiny": {"path": str(data.packed)}},
        seq_len=data.seq_len,
        seed=0,
        rows_per_step=ROWS,
        rank=rank,
        world_size=world_size,
        tokenizer=data.tokenizer,
    ) as stream:
        return [next(stream) for _ in range(ROWS // world_size)]


def conversations_of(rows: list[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, labels) [1, n] of every conversation, cut from the rows without project code."""
    found = []
    for row in rows:
        end = 0
        for length in row["doc_lens"].tolist():
            start, end = end, end + length
            ids = torch.tensor(row["input_ids"][start:end].astype("int64"))[None]
            supervised = torch.tensor(row["loss_mask"][start:end])[None]
            found.append((ids, torch.where(supervised, ids, IGNORE_INDEX)))
    return found


def reference(data: TinyConversations, name: str) -> tuple[dict[str, torch.Tensor], int]:
    """The gradient of a plain loop, a conversation at a time, and the number of targets."""
    model = load_model(data.models[name], dtype=torch.float32).train()
    conversations = conversations_of(rows_of_the_step(data))
    targets = sum(int((labels[:, 1:] != IGNORE_INDEX).sum()) for _, labels in conversations)
    for ids, labels in conversations:
        outputs: Any = model(
            input_ids=ids, labels=labels, num_items_in_batch=targets, use_cache=False
        )
        loss = outputs.loss
        if getattr(outputs, "mtp_loss", None) is not None:
            loss = loss + MTP_WEIGHT * outputs.mtp_loss
        loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, targets


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_step_has_the_same_gradient_packed_padded_and_one_by_one_on_1_and_2_ranks(
    name: str, gradients: Path, tiny_conversations: TinyConversations
) -> None:
    expected, targets = reference(tiny_conversations, name)
    passes = {}
    for ranks in RANKS:
        for way in WAYS:
            found = torch.load(gradients / str(ranks) / name / f"{way}.pt")
            passes[ranks, way] = found["passes"]
            assert found["targets"] == targets
            assert found["gradients"].keys() == expected.keys()
            for parameter, gradient in expected.items():
                error = (found["gradients"][parameter] - gradient).norm() / gradient.norm()
                assert error <= 1e-4, f"{ranks} rank(s), {way}: {parameter} is off by {error:.1e}"
    # The three ways are three computations, shared by the ranks.
    assert passes[1, "packed"] == 2 * passes[2, "packed"] == 4
    assert passes[1, "one_by_one"] > passes[2, "one_by_one"] > 2 * passes[2, "packed"]


def test_fine_tuning_starts_with_the_pretrained_routing(
    gradients: Path, tiny_conversations: TinyConversations
) -> None:
    name = "mini_deepseekv3_tiny"
    model = load_model(tiny_conversations.models[name], dtype=torch.float32).eval()
    routers = find_routers(model)
    assert all(router.e_score_correction_bias.abs().max() > 0.05 for router in routers.values())
    for rank in range(2):
        trained = torch.load(gradients / "2" / name / f"experts-{rank}.pt")
        rows = rows_of_the_step(tiny_conversations, rank, 2)
        for layer, router in routers.items():
            if not trained[str(layer)] or layer >= model.config.num_hidden_layers:
                continue  # evaluation does not run the multi-token-prediction layer
            seen: list[torch.Tensor] = []
            hook = router.register_forward_hook(lambda m, i, out, to=seen: to.append(out[2]))
            places = []
            with torch.no_grad():
                for row_number, row in enumerate(rows):
                    for start, document in documents_of(row):
                        model(input_ids=document, use_cache=False)
                        first = row_number * tiny_conversations.seq_len + start
                        places += range(first, first + document.shape[1])
            hook.remove()
            chosen = torch.cat(trained[str(layer)])[places].sort(1).values
            assert torch.equal(chosen, torch.cat(seen).sort(1).values)
            assert len(chosen) > 300


def documents_of(row: Any) -> list[tuple[int, torch.Tensor]]:
    """(start in the row, input_ids [1, n]) of every conversation of a row."""
    starts = row["doc_lens"].cumsum() - row["doc_lens"]
    return [
        (start, torch.tensor(row["input_ids"][start : start + length].astype("int64"))[None])
        for start, length in zip(starts.tolist(), row["doc_lens"].tolist(), strict=True)
    ]


def test_one_document_per_row_is_what_the_padded_way_computes(
    tiny_conversations: TinyConversations,
) -> None:
    rows = rows_of_the_step(tiny_conversations)
    padded = one_document_per_row(rows)
    assert [len(row["doc_lens"]) for row in padded] == [1] * sum(len(r["doc_lens"]) for r in rows)
    for row, (ids, labels) in zip(padded, conversations_of(rows), strict=True):
        length = int(row["doc_lens"][0])
        assert row["input_ids"][:length].tolist() == ids[0].tolist()
        assert row["loss_mask"][:length].tolist() == (labels[0] != IGNORE_INDEX).tolist()
        assert not row["loss_mask"][length:].any()
