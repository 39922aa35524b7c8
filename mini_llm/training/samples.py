"""What a model in training writes after the same prompts again and again."""

import dataclasses
import html
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from transformers import GenerationConfig

from mini_llm.data.conversations import ASSISTANT, USER, Conversation, why_invalid
from mini_llm.durable import write_whole
from mini_llm.hub.export import base_generation_config, chat_generation_config
from mini_llm.parallel.expert_parallel import stock_state_dict
from mini_llm.parallel.watchdog import beat

from .wandb_tracker import SAMPLES


def check_prompt_lengths(prompts: list[Any], tokenizer: Any, context: int) -> None:
    """Raise ValueError, naming --sample_prompts, for what a base model cannot complete.

    ``context`` is the number of tokens that prompt and completion may have together.
    """
    for number, prompt in enumerate(prompts, start=1):
        tokens = len(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else 0
        if not 0 < tokens < context:
            raise ValueError(
                f"--sample_prompts: prompt {number} has {tokens} tokens of text; give a text of at "
                f"least one and fewer than --seq_len {context}"
            )


@dataclass(frozen=True)
class Answer:
    """How a model went on after a prompt at a step, its end token visible."""

    step: int
    prompt: str
    answer: str
    stopped: bool  # by itself, at an end token
    tokens: int  # generated, the end token included


class PromptSamples:
    """Gives the model in training the same prompts again and again, and keeps all its answers.

    They go to ``output_dir/samples.txt`` and to the trackers. With ``chat`` a prompt is a question
    or a list of messages that ends with one, and the likeliest tokens are taken; else it is the
    begin of a text, which is continued as the saved generation config says, with the random numbers
    of ``seed``. What was answered after ``start_step`` is dropped. Raises ValueError, naming the
    flag, for prompts that :func:`check_prompts` refuses and for a tokenizer without the chat
    tokens.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        tokenizer: Any,
        output_dir: Path,
        prompts: list[Any],
        *,
        chat: bool,
        max_new_tokens: int,
        seed: int,
        start_step: int,
    ) -> None:
        check_prompts(prompts, chat=chat)
        self.accelerator = accelerator
        self.tokenizer = tokenizer
        self.path = output_dir / "samples.txt"
        self.prompts = prompts
        self.chat, self.seed = chat, seed
        self.answers: list[Answer] = []
        self._copy: Any = None
        if not prompts:
            return
        if chat:
            ends = chat_generation_config(tokenizer)
            # The likeliest token, so that steps can be compared.
            self.generation_config = GenerationConfig(
                do_sample=False,
                eos_token_id=ends.eos_token_id,
                pad_token_id=ends.pad_token_id,
            )
        else:  # a base model that takes the likeliest token soon repeats itself
            self.generation_config = base_generation_config(tokenizer)
        self.generation_config.max_new_tokens = max_new_tokens
        if accelerator.is_main_process and self.path.is_file():
            # A run that was killed while writing may have left half a character.
            found = parse_answers(self.path.read_bytes().decode(errors="replace"))
            self._rewrite([answer for answer in found if answer.step <= start_step])

    def take(self, model: nn.Module, step: int) -> dict[str, float]:
        """Answer all prompts with ``model``'s weights of ``step``; a collective of all ranks.

        Returns ``samples/stopped``, the share of answers that stopped by themselves, and
        ``samples/tokens``, the mean number of generated tokens; {} without prompts. The random
        states stay as they are, so a run with samples is the run without.
        """
        if not self.prompts:
            return {}
        beat("answering the prompts")
        with _untouched_random_states(self.accelerator.device):
            state_dict = stock_state_dict(self.accelerator, model)  # ZeRO-3 gathers the weights
            answers = []
            if self.accelerator.is_main_process:
                self._refresh_copy(self.accelerator.unwrap_model(model), state_dict)
            del state_dict
            for prompt in self.prompts:
                if self.accelerator.is_main_process:
                    answers.append(self._answer(prompt, step))
                # The others' time limit is for one answer, not for all.
                self.accelerator.wait_for_everyone()
                beat()
            numbers = [0.0, 0.0]
            if self.accelerator.is_main_process:
                self._record(answers, step)
                numbers = [
                    sum(answer.stopped for answer in answers) / len(answers),
                    sum(answer.tokens for answer in answers) / len(answers),
                ]
            sent = torch.tensor(numbers, dtype=torch.float64, device=self.accelerator.device)
            stopped, tokens = broadcast(sent).tolist()
        return {"samples/stopped": stopped, "samples/tokens": tokens}

    def text(self) -> str:
        """The answers of the last step that has some, as in samples.txt; on rank 0 alone."""
        if not self.answers:
            return ""
        last = self.answers[-1].step
        return format_answers([answer for answer in self.answers if answer.step == last])

    def _refresh_copy(self, unwrapped: Any, state_dict: dict[str, torch.Tensor]) -> None:
        """Let rank 0's own model, which no engine knows, have the weights of ``state_dict``.

        Its weights are of the training weights' dtype and compute in it, without autocast: it
        answers as the checkpoint of this step will.
        """
        if self._copy is None:
            copy = type(unwrapped)(deepcopy(unwrapped.config))
            copy.set_attn_implementation("sdpa")  # flash attention cannot compute in fp32
            copy.to(self.accelerator.device, dtype=next(unwrapped.parameters()).dtype)
            self._copy = copy.eval()
        if unwrapped.config.tie_word_embeddings:  # an engine may leave out the second of the two
            for tied, source in unwrapped._tied_weights_keys.items():
                state_dict = {**state_dict, tied: state_dict[source]}
        self._copy.load_state_dict(state_dict)

    def _answer(self, prompt: Any, step: int) -> Answer:
        """One prompt alone: in bf16, padding it to another's length changes near-ties."""
        shown, inputs = self._inputs(prompt)
        torch.manual_seed(self.seed)
        output = self._copy.generate(
            **inputs.to(self.accelerator.device),
            generation_config=self.generation_config,
            synced_gpus=False,  # under ZeRO-3 transformers would wait for the other ranks
        )
        generated = output[0, inputs["input_ids"].shape[1] :].tolist()
        ends = self.generation_config.eos_token_id
        return Answer(
            step=step,
            prompt=shown,
            answer=self.tokenizer.decode(generated, skip_special_tokens=False),
            stopped=generated[-1] in (ends if isinstance(ends, list) else [ends]),
            tokens=len(generated),
        )

    def _inputs(self, prompt: Any) -> tuple[str, Any]:
        """A prompt as text and as the model's inputs."""
        if not self.chat:
            return prompt, self.tokenizer(prompt, return_tensors="pt")
        messages = _messages(prompt)
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        return "\n".join(f"{said['role']}: {said['content']}" for said in messages), inputs

    def _record(self, answers: list[Answer], step: int) -> None:
        """Append to samples.txt; give W&B the table of all steps, TensorBoard this step's."""
        if self.answers and self.answers[-1].step >= step:  # the run went back to before it
            self._rewrite([answer for answer in self.answers if answer.step < step])
        self.answers += answers
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(format_answers(answers).encode())
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                columns = [field.name for field in dataclasses.fields(Answer)]
                rows = [list(dataclasses.astuple(answer)) for answer in self.answers]
                tracker.log_table(SAMPLES, columns=columns, data=rows, step=step)
            elif tracker.name == "tensorboard":
                tracker.log({SAMPLES: _markdown_table(answers)}, step=step)

    def _rewrite(self, answers: list[Answer]) -> None:
        self.answers = answers
        write_whole(self.path, format_answers(answers))


def check_prompts(prompts: list[Any], *, chat: bool) -> None:
    """Raise ValueError, naming --sample_prompts, for what a model cannot be asked."""
    for number, prompt in enumerate(prompts, start=1):
        if not chat:
            if not isinstance(prompt, str) or not prompt:
                raise ValueError(
                    f"--sample_prompts: prompt {number} is {prompt!r}; give the begin of a text"
                )
            continue
        if isinstance(prompt, (str, list)):
            placeholder = {"role": ASSISTANT, "content": "."}
            reason = why_invalid([*_messages(prompt), placeholder])
        else:
            reason = "neither a text nor a list"
        if reason is not None:
            raise ValueError(
                f"--sample_prompts: prompt {number} cannot be asked ({reason}); give a question, "
                "or a list of messages with role and content that ends with a user's"
            )


def _messages(prompt: str | Conversation) -> Conversation:
    return [{"role": USER, "content": prompt}] if isinstance(prompt, str) else prompt


STOPPED, CUT = "stopped by itself", "cut at --sample_max_new_tokens"
# A step's headline, or a prompt with its answer. Only what is not indented has a meaning.
_PIECE = re.compile(
    r"^=== step (?P<step>\d+):"
    r"|^--- prompt \d+\n(?P<prompt>(?:  .*\n)+)"
    rf"--- answer \d+: (?P<tokens>\d+) tokens, (?P<end>{STOPPED}|{CUT})\n(?P<answer>(?:  .*\n)+)",
    re.MULTILINE,
)


def format_answers(answers: list[Answer]) -> str:
    """The text of samples.txt, which :func:`parse_answers` reads back."""
    lines = []
    for step, group in groupby(answers, key=lambda answer: answer.step):
        of_step = list(group)
        stopped = sum(answer.stopped for answer in of_step)
        mean = sum(answer.tokens for answer in of_step) / len(of_step)
        lines.append(
            f"=== step {step}: {stopped} of {len(of_step)} answers stopped by themselves, "
            f"{mean:.1f} tokens on average"
        )
        for number, answer in enumerate(of_step, start=1):
            end = STOPPED if answer.stopped else CUT
            lines += [f"--- prompt {number}", *_indented(answer.prompt)]
            lines += [f"--- answer {number}: {answer.tokens} tokens, {end}"]
            lines += _indented(answer.answer)
    return "".join(f"{line}\n" for line in lines)


def parse_answers(text: str) -> list[Answer]:
    """The answers in a samples.txt; a prompt whose answer a killed run left out does not count."""
    answers, step = [], 0
    for piece in _PIECE.finditer(text):
        if piece["step"] is not None:
            step = int(piece["step"])
            continue
        prompt, answer = (
            "\n".join(line[2:] for line in piece[name].split("\n")[:-1])
            for name in ("prompt", "answer")
        )
        answers.append(Answer(step, prompt, answer, piece["end"] == STOPPED, int(piece["tokens"])))
    return answers


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.split("\n")]


def _markdown_table(answers: list[Answer]) -> str:
    def cell(text: str) -> str:
        return html.escape(text).replace("|", "&#124;").replace("\n", "<br>")

    rows = ["| prompt | answer | stopped | tokens |", "|---|---|---|---|"]
    rows += [
        f"| {cell(a.prompt)} | {cell(a.answer)} | {'yes' if a.stopped else 'no'} | {a.tokens} |"
        for a in answers
    ]
    return "\n".join(rows)


@contextmanager
def _untouched_random_states(device: torch.device) -> Iterator[None]:
    """Give torch (CPU and ``device``), numpy and Python the random states back that they had."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)
