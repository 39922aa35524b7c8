"""``launch.sh generate CKPT --prompt …``: text from a model, without a terminal."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mini_llm.command_line import Parser

from .flags import (
    add_model_flags,
    add_sampling_flags,
    from_command_line,
    sampling_from,
    speak_utf8,
)

if TYPE_CHECKING:
    from .generator import Result


def main(command_line: list[str] | None = None) -> None:
    """Run the command; ends with status 2 and one sentence where it cannot be done."""
    arguments = _parser().parse_args(command_line)
    speak_utf8()
    try:
        prompts = read_prompts(arguments)
        run(arguments, prompts)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch.sh generate",
        description="Complete prompts, or answer them where the model is a chat model.",
    )
    add_model_flags(parser)
    prompts = parser.add_argument_group("prompts", "without any, standard input is the prompt")
    prompts.add_argument("--prompt", action="append", default=[], help="may be repeated")
    prompts.add_argument(
        "--prompt_file",
        action="append",
        default=[],
        type=Path,
        metavar="F",
        help="the file's text is a prompt; may be repeated",
    )
    prompts.add_argument(
        "--chat",
        choices=("true", "false"),
        help="put the prompt into the chat template (default: where the model is a chat model)",
    )
    prompts.add_argument("--system", default="", help="system message of the chat")
    prompts.add_argument(
        "--think", choices=("true", "false"), help="open or skip the thoughts of a chat model"
    )
    add_sampling_flags(parser, max_new_tokens=256)
    output = parser.add_argument_group(
        "output", "one prompt with one sample is shown while it comes"
    )
    output.add_argument("--num_samples", type=int, default=1, help="of each prompt (default: 1)")
    output.add_argument("--json", action="store_true", help="a line of JSON for each sample")
    output.add_argument("--logprobs", action="store_true", help="with --json: of each token")
    output.add_argument(
        "--batch_size", type=int, default=32, help="samples at a time at most (default: 32)"
    )
    return parser


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """Those of the command line, then those of files; else standard input.

    Raises ValueError where there is none.
    """
    for name in ("num_samples", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}; give at least 1")
    if arguments.logprobs and not arguments.json:
        raise ValueError("--logprobs shows only in --json; give both")
    prompts = [from_command_line(prompt) for prompt in arguments.prompt]
    for path in arguments.prompt_file:
        try:
            prompts.append(path.read_bytes().decode())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompt_file: {path} cannot be read as UTF-8: {error}") from error
    if prompts:
        return prompts
    if sys.stdin.isatty():
        raise ValueError("there is no prompt; give --prompt, --prompt_file or standard input")
    return [sys.stdin.read()]


def run(arguments: argparse.Namespace, prompts: list[str]) -> None:
    """Open the model, generate, print. Raises ValueError for what cannot be done."""
    from .checkpoint import chat_prompt, open_generator
    from .ends import is_chat_model

    generator = open_generator(arguments.checkpoint, device=arguments.device, dtype=arguments.dtype)
    sampling = sampling_from(arguments, generator)
    chat = (
        is_chat_model(generator.tokenizer, generator.model.generation_config)
        if arguments.chat is None
        else arguments.chat == "true"
    )
    if chat and not generator.tokenizer.chat_template:
        raise ValueError(f"--chat: the tokenizer of {arguments.checkpoint} has no chat template")
    for flag, value in (("system", arguments.system), ("think", arguments.think)):
        if value and not chat:
            raise ValueError(
                f"--{flag} is for chat models, and {arguments.checkpoint} is a base model; "
                "leave it out, or force the chat template with --chat true"
            )
    encoded: list[list[int]] = []
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; give at least one character")
        if chat:
            system = [{"role": "system", "content": from_command_line(arguments.system)}]
            messages = [*(system if arguments.system else []), {"role": "user", "content": prompt}]
            think = None if arguments.think is None else arguments.think == "true"
            encoded.append(chat_prompt(generator, messages, think))
        else:
            encoded.append(generator.encode(prompt))
    if len(encoded) == arguments.num_samples == 1 and not arguments.json:
        for piece in generator.stream(encoded[0], sampling):
            print(piece, end="", flush=True)
        print(flush=True)
        return
    results = generator.generate(
        encoded,
        sampling,
        n=arguments.num_samples,
        logprobs=arguments.logprobs,
        batch_size=arguments.batch_size,
    )
    for number, result in enumerate(results):
        prompt_number, sample = divmod(number, arguments.num_samples)
        if arguments.json:
            print(_line(prompts[prompt_number], sample, result))
        else:
            print(f"--- prompt {prompt_number + 1}, sample {sample + 1}\n{result.text}")


def _line(prompt: str, sample: int, result: "Result") -> str:
    fields = {"prompt": prompt, "sample": sample + 1, "text": result.text}
    fields |= {"token_ids": result.token_ids, "finish_reason": result.finish_reason}
    if result.logprobs is not None:
        fields["logprobs"] = result.logprobs
    return json.dumps(fields, ensure_ascii=False)


if __name__ == "__main__":
    main()
