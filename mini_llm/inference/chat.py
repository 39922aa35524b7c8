"""``launch.sh chat CKPT``: talk to a model in the terminal.

A chat model answers with the whole conversation in mind; a base model completes each line that it
is given. Ctrl-C ends a reply, Ctrl-D the program. Where input or output is no terminal, a line of
standard input is a turn.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mini_llm.command_line import Parser

from .flags import (
    add_model_flags,
    add_sampling_flags,
    from_command_line,
    sampling_from,
    speak_utf8,
)

if TYPE_CHECKING:
    from .generator import Generator
    from .sampling import Sampling

THINK_START, THINK_END = "<think>", "</think>"
HELP = """\
/help             this list
/reset            forget the conversation; the system message stays
/system TEXT      tell the model this first, from the next turn on; without TEXT, nothing
/think on|off     let the model think before it answers, or not (auto: as it likes)
/think show|hide  show its thoughts, or only that it has some
/retry            answer the last turn once more
/save FILE        write the conversation as a line of JSON, as recipes/sft.py trains on
/load FILE        go on with a conversation that was saved
/exit             leave, as Ctrl-D does; Ctrl-C ends a reply
Alt-Enter begins a new line; lines that are pasted together are one turn."""


def main(command_line: list[str] | None = None) -> None:
    """Run the command; ends with status 2 and one sentence where it cannot be done."""
    arguments = _parser().parse_args(command_line)
    speak_utf8()
    try:
        from .checkpoint import open_generator
        from .ends import is_chat_model

        generator = open_generator(
            arguments.checkpoint, device=arguments.device, dtype=arguments.dtype
        )
        sampling = sampling_from(arguments, generator)
        chats = (
            is_chat_model(generator.tokenizer, generator.model.generation_config)
            if arguments.chat is None
            else arguments.chat == "true"
        )
        if chats and not generator.tokenizer.chat_template:
            raise ValueError(
                f"--chat: the tokenizer of {arguments.checkpoint} has no chat template"
            )
        if arguments.system and not chats:
            raise ValueError(
                f"--system is for chat models, and {arguments.checkpoint} is a base model; "
                "leave it out, or force the chat template with --chat true"
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    terminal = Terminal()
    parameters = sum(parameter.numel() for parameter in generator.model.parameters())
    kind = "chat model" if chats else "base model, which completes what it is given"
    terminal.note(
        f"{arguments.checkpoint}: {generator.model.config.model_type}, {parameters:,} parameters, "
        f"{kind}; /help lists the commands, Ctrl-D leaves"
    )
    system = from_command_line(arguments.system)
    Chat(generator, sampling, terminal, chats=chats, system=system).run()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch.sh chat",
        description="Talk to a model in the terminal. Commands there:\n" + HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_flags(parser)
    parser.add_argument("--system", default="", help="what the model is told first")
    parser.add_argument(
        "--chat",
        choices=("true", "false"),
        help="use the chat template, or complete (default: as the model was trained)",
    )
    add_sampling_flags(parser, max_new_tokens=1024)
    return parser


class Terminal:
    """Reads turns and writes replies: with line editing in a terminal, plainly elsewhere."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.styled = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._session: Any = None
        if self.interactive:
            # Not readline: under a locale that is not UTF-8 that one deletes half a character.
            from prompt_toolkit import PromptSession
            from prompt_toolkit.key_binding import KeyBindings

            keys = KeyBindings()
            keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
            self._session = PromptSession("> ", key_bindings=keys)

    def read(self) -> str:
        """The next turn, without spaces around it; EOFError at the end, KeyboardInterrupt."""
        if self._session is not None:
            return str(self._session.prompt()).strip()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.strip()

    def write(self, text: str, *, dim: bool = False) -> None:
        """A piece of a reply, at once."""
        print(f"\x1b[2m{text}\x1b[0m" if dim and self.styled else text, end="", flush=True)

    def note(self, text: str) -> None:
        """A line that is not the model's."""
        self.write(text, dim=True)
        self.write("\n")


class Chat:
    """A conversation (or, for a base model, one completion after another) and its commands."""

    def __init__(
        self,
        generator: "Generator",
        sampling: "Sampling",
        terminal: Terminal,
        *,
        chats: bool,
        system: str = "",
    ) -> None:
        self.generator, self.sampling, self.terminal = generator, sampling, terminal
        self.chats = chats
        self.system = system
        self.messages: list[dict[str, str]] = []  # user, assistant, user, …
        self.forgotten = 0  # of them, the first so many no longer fit into the context
        self.think: bool | None = None
        self.shows_thoughts = True
        self.replies = 0
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.terminal.write(HELP + "\n"),
            "/reset": self.reset,
            "/system": self.set_system,
            "/think": self.set_think,
            "/retry": self.retry,
            "/save": self.save,
            "/load": self.load,
        }

    def run(self) -> None:
        """Take turns until the end of the input or /exit."""
        while True:
            try:
                turn = self.terminal.read()
                if turn == "/exit":
                    return
                if turn:
                    self.take(turn)
            except EOFError:
                return
            except KeyboardInterrupt:
                self.terminal.note("(Ctrl-D or /exit leaves)")
            except ValueError as error:
                self.terminal.note(f"error: {error}")

    def take(self, turn: str) -> None:
        """A command, or something to answer. Raises ValueError for what cannot be done."""
        name, _, rest = turn.partition(" ")
        if name in self.commands:
            self.commands[name](rest.strip())
        elif turn.startswith("/") and "\n" not in turn and "/" not in name[1:]:
            raise ValueError(f"{name} is no command; /help lists them")
        else:
            self.answer(turn)

    # ---- Answering -------------------------------------------------------------------------------

    def answer(self, turn: str) -> None:
        """Reply to ``turn``; what was said of the reply, when it was cut short, is kept."""
        self.messages.append({"role": "user", "content": turn})
        reply = ""
        try:
            reply = self.reply()
        finally:
            if reply:
                self.messages.append({"role": "assistant", "content": reply})
            else:
                self.messages.pop()  # as if it had not been asked

    def reply(self) -> str:
        """Stream the answer to the last message and return it."""
        from .text import Thoughts

        prompt = self.prompt()
        seed = self.sampling.seed
        if seed is not None:
            seed += self.replies  # so that /retry does not repeat itself
        self.replies += 1
        stream = self.generator.stream(prompt, replace(self.sampling, seed=seed))
        thoughts = Thoughts(THINK_START, THINK_END, inside=self.opens_thoughts)
        screen = _Screen(self.terminal, shows_thoughts=self.shows_thoughts)
        started = time.perf_counter()
        first = None
        interrupted = False
        try:
            for piece in stream:
                first = first or time.perf_counter()
                screen.show(thoughts.add(piece))
            screen.show(thoughts.rest())
        except KeyboardInterrupt:
            interrupted = True
        ended = time.perf_counter()
        self.terminal.write("\n")
        count = len(stream.token_ids)
        note = f"{count} tokens"
        if first is not None:
            note += f", first after {first - started:.1f} s"
            if count > 1:
                note += f", then {(count - 1) / (ended - first):.1f} tokens/s"
        if interrupted:
            note += "; interrupted"
        elif stream.finish_reason == "length":
            full = len(prompt) + count == self.generator.context
            note += f"; cut: {'the context is full' if full else '--max_new_tokens is reached'}"
        self.terminal.note(f"[{note}]")
        return f"{THINK_START}\n{stream.text}" if self.opens_thoughts else stream.text

    @property
    def opens_thoughts(self) -> bool:
        """Whether the prompt itself begins the thoughts."""
        return self.chats and self.think is True

    def prompt(self) -> list[int]:
        """The tokens that the model is to go on from; the oldest turns go where room is short."""
        from .checkpoint import chat_prompt

        if not self.chats:
            return self.generator.encode(self.messages[-1]["content"])
        context = self.generator.context
        room = 0 if context is None else min(self.sampling.max_new_tokens, context // 4)
        forgotten = self.forgotten
        while True:
            tokens = chat_prompt(self.generator, self.seen(forgotten), self.think)
            if context is None or len(tokens) + room <= context:
                break
            if forgotten + 2 >= len(self.messages):
                if len(tokens) < context:
                    break
                raise ValueError(
                    f"this turn has {len(tokens)} tokens, and the model's context is {context}; "
                    "say less at a time"
                )
            forgotten += 2
        if forgotten > self.forgotten:
            self.forgotten = forgotten
            self.terminal.note(
                f"(the context of {context} tokens is full: the model no longer sees the first "
                f"{forgotten // 2} turn(s))"
            )
        return tokens

    def seen(self, forgotten: int) -> list[dict[str, str]]:
        """What the model is shown: the system message, and what is not forgotten."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages[forgotten:]]

    # ---- Commands --------------------------------------------------------------------------------

    def reset(self, _: str = "") -> None:
        """Begin a new conversation."""
        self.messages, self.forgotten = [], 0
        self.terminal.note("(a new conversation)")

    def set_system(self, text: str) -> None:
        """Change the system message."""
        self._only_for_chat_models("/system")
        self.system = text
        self.terminal.note("(the system message is set)" if text else "(no system message)")

    def set_think(self, how: str) -> None:
        """Let the model think or not; show the thoughts or not."""
        self._only_for_chat_models("/think")
        if how in ("show", "hide"):
            self.shows_thoughts = how == "show"
            self.terminal.note(f"(thoughts are {'shown' if self.shows_thoughts else 'hidden'})")
        elif how in ("on", "off", "auto"):
            if "enable_thinking" not in str(self.generator.tokenizer.chat_template):
                raise ValueError(
                    "the chat template of this model has no thoughts to turn on or off"
                )
            self.think = {"on": True, "off": False, "auto": None}[how]
            will = {"on": "thinks first", "off": "does not think", "auto": "thinks if it likes"}
            self.terminal.note(f"(the model {will[how]})")
        else:
            raise ValueError("/think takes on, off, auto, show or hide")

    def retry(self, _: str = "") -> None:
        """Answer the last turn again."""
        if len(self.messages) < 2:
            raise ValueError("there is nothing to answer once more")
        old = list(self.messages)
        del self.messages[-2:]
        try:
            self.answer(old[-2]["content"])
        finally:
            if len(self.messages) < len(old):  # no new answer: keep the old one
                self.messages = old

    def save(self, file: str) -> None:
        """Write the conversation to a new file."""
        path = self._file("/save", file)
        if not self.messages:
            raise ValueError("/save: nothing has been said yet")
        messages = self.seen(0)
        try:
            with path.open("x", encoding="utf-8") as opened:
                opened.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ValueError(f"/save: {path} cannot be written: {error.strerror}") from error
        self.terminal.note(f"(saved {len(messages)} messages in {path})")

    def load(self, file: str) -> None:
        """Go on with a saved conversation."""
        path = self._file("/load", file)
        try:
            messages = json.loads(path.read_bytes())["messages"]
            roles = [message["role"] for message in messages]
            texts = [message["content"] for message in messages]
        except OSError as error:
            raise ValueError(f"/load: {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"/load: {path} holds no conversation that /save wrote") from error
        system = texts.pop(0) if roles[:1] == ["system"] else ""
        turns = ["user", "assistant"] * (len(texts) // 2)
        if roles[len(roles) - len(texts) :] != turns or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"/load: {path} holds no conversation that /save wrote")
        self.system, self.forgotten = system, 0
        self.messages = [
            {"role": role, "content": text} for role, text in zip(turns, texts, strict=True)
        ]
        self.terminal.note(f"(loaded {len(roles)} messages from {path})")

    def _file(self, command: str, file: str) -> Path:
        if not file:
            raise ValueError(f"{command} needs the name of a file")
        try:
            return Path(file).expanduser()
        except RuntimeError as error:  # ~name, of somebody who has no account here
            raise ValueError(
                f"{command}: {file} begins with the name of no user; write ./{file}"
            ) from error

    def _only_for_chat_models(self, command: str) -> None:
        if not self.chats:
            raise ValueError(
                f"{command} is for chat models; this base model completes what it reads"
            )


class _Screen:
    """What is seen of a reply: its thoughts dimmed, or only mentioned."""

    def __init__(self, terminal: Terminal, *, shows_thoughts: bool) -> None:
        self.terminal, self.shows_thoughts = terminal, shows_thoughts
        self._mentioned = self._begun = False

    def show(self, parts: list[tuple[str, bool]]) -> None:
        """Write (text, whether it is thought)."""
        for text, is_thought in parts:
            if is_thought and not self.shows_thoughts:
                if not self._mentioned:
                    self.terminal.note("(thinking)")
                self._mentioned = True
                continue
            if not self._begun:
                text = text.lstrip("\n")
                self._begun = bool(text)
            self.terminal.write(text, dim=is_thought)


if __name__ == "__main__":
    main()
