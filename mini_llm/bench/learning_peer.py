"""What ``bench learning`` sets beside the recipe: the stock class under transformers' Trainer.

    python -m mini_llm.bench.learning_peer FLAGS OF recipes/pretrain.py

Takes the recipe's own command line, so that both read the same hyperparameters from the same flags,
and leaves a stock checkpoint in ``output_dir/final`` and Trainer's log in ``trainer_state.json``.
"""

# ruff: noqa: E402
from __future__ import annotations

from pathlib import Path
from typing import Any

from ..parallel.environment import prepare_environment
from ..training.arguments import PretrainArguments, parse_arguments

prepare_environment()  # transformers reads it when it is imported

import torch
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ..data import collate, load_tokenizer, open_stream
from ..models import preset_config
from ..training.optimizer import learning_rate_at

CONFIG = "recipes/configs/quickstart/pretrain.yaml"
FIELDS = ("input_ids", "position_ids", "labels")


class RowsInOrder(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The rows that the recipe trains on, in its order, each as the tensors (T,) of ``FIELDS``.

    ``position_ids`` begin anew with each document, and no label crosses from one to the next.
    """

    def __init__(self, args: PretrainArguments) -> None:
        stream = open_stream(
            args.data,
            seq_len=args.seq_len,
            seed=args.seed,
            rows_per_step=args.rows_per_step(),
            tokenizer=args.tokenizer,
        )
        with stream:
            rows = (next(stream) for _ in range(args.max_steps * args.rows_per_step()))
            self.rows: list[dict[str, torch.Tensor]] = []
            for row in rows:
                batch: Any = collate([row])
                self.rows.append({name: batch[name][0] for name in FIELDS})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


class PeerTrainer(Trainer):
    """Trainer with the recipe's learning rate at every step, and its choice of what decays.

    Trainer's own warm-up begins with a step at learning rate 0. It exempts norms and biases from
    weight decay by their names, the recipe whatever is no matrix: they differ in one parameter,
    the decay rates ``A_log`` of a gated delta net, which Trainer would let decay.
    """

    recipe: PretrainArguments

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of ``--lr_scheduler_type``, as the recipe computes it."""
        recipe = self.recipe

        def share_of_peak(steps_done: int) -> float:
            return (
                learning_rate_at(
                    steps_done + 1,
                    peak=recipe.learning_rate,
                    max_steps=recipe.max_steps,
                    warmup_steps=recipe.warmup,
                    min_lr_ratio=recipe.min_lr_ratio,
                    schedule=recipe.lr_scheduler_type,
                    decay_steps=recipe.decay,
                )
                / recipe.learning_rate
            )

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share_of_peak)
        return self.lr_scheduler

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Trainer's own names, vectors left out."""
        parameters = dict(model.named_parameters())
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if name in parameters and parameters[name].ndim > 1]


def stock_model(args: PretrainArguments) -> Any:
    """The stock class of the preset's shape, with its own initial weights from ``--seed``.

    A class that has a balance loss of its own adds it with the weight of ``balance_loss_weight``.
    """
    tokenizer = load_tokenizer(args.tokenizer)
    overrides = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **args.model_overrides,
    }
    config: Any = preset_config(args.model, **overrides)
    if hasattr(config, "router_aux_loss_coef"):
        config.output_router_logits = True
        config.router_aux_loss_coef = args.balance_loss_weight
    set_seed(args.seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=args.attn_implementation)


def build_trainer(args: PretrainArguments) -> PeerTrainer:
    """Trainer of the stock model, with everything that the recipe's flags say."""
    accumulation = args.gradient_accumulation_steps(world_size=1)
    arguments = TrainingArguments(
        output_dir=args.output_dir,
        seed=args.seed,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_epsilon=args.adam_epsilon,
        max_grad_norm=args.max_grad_norm,
        use_cpu=True,
        logging_steps=args.logging_steps,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PeerTrainer(model=stock_model(args), args=arguments, train_dataset=RowsInOrder(args))
    trainer.recipe = args
    return trainer


def main(args: PretrainArguments) -> None:
    """Train, and save what was trained."""
    trainer = build_trainer(args)
    trainer.train()
    trainer.save_state()
    trainer.save_model(str(Path(args.output_dir, "final")))


if __name__ == "__main__":
    main(parse_arguments(PretrainArguments, CONFIG))
