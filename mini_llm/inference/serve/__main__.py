"""Serve a trained model to OpenAI clients: chat, completions, models; health and metrics."""

import argparse
import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Any

from mini_llm.command_line import Parser
from mini_llm.parallel.environment import prepare_environment

KEY_VARIABLE = "MINI_LLM_API_KEY"
TRANSFORMERS_MINIMUM = "5.23"  # before, continuous batching has other arguments
PACKAGES = ("fastapi", "uvicorn", "openai", "prometheus_client")  # of the extra "serve"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(prog="./launch.sh serve", description=__doc__)
    flags.add_argument(
        "checkpoint",
        type=Path,
        metavar="CKPT",
        help="a run's folder, its final/, one of its checkpoints/step-N, or a stock checkpoint",
    )
    flags.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    flags.add_argument(
        "--port", type=_whole(0, 65535), default=8000, help="0 is a free one (default: %(default)s)"
    )
    flags.add_argument(
        "--api_key",
        metavar="KEY",
        help=f"what clients have to send; better in {KEY_VARIABLE}, for others on this machine can "
        "see the flags of a process; needed where --host can be reached from other machines",
    )
    flags.add_argument(
        "--served_model_name", metavar="NAME", help="the model's id (default: its folder's name)"
    )
    flags.add_argument(
        "--max_prompt_tokens",
        type=_whole(1),
        metavar="N",
        help="longest prompt (default: what leaves room in the context for a token)",
    )
    flags.add_argument(
        "--max_new_tokens_limit",
        type=_whole(1),
        metavar="N",
        help="longest answer, whatever a request asks for (default: what fits in the context)",
    )
    flags.add_argument(
        "--max_concurrent_requests",
        type=_whole(1),
        default=16,
        metavar="N",
        help="answers generated at a time (default: %(default)s)",
    )
    flags.add_argument(
        "--max_waiting_requests",
        type=_whole(0),
        default=112,
        metavar="N",
        help="requests that wait for their turn; more get status 429 (default: %(default)s)",
    )
    flags.add_argument(
        "--request_timeout",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="for an answer and the wait for it; then status 504 (default: %(default)s)",
    )
    flags.add_argument(
        "--max_body_bytes",
        type=_whole(1),
        default=262_144,
        metavar="N",
        help="longest request; longer ones get status 413 (default: %(default)s)",
    )
    flags.add_argument(
        "--cors_origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="pages that a browser lets in, e.g. https://chat.example.org, or '*' (default: those "
        "of this machine and of desktop programs)",
    )
    flags.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: float32 on a CPU, the checkpoint's own on a GPU",
    )
    flags.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda:1")
    return flags


def _whole(least: int, most: int | None = None) -> Any:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or not least <= int(text) <= (most or int(text)):
            limit = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"must be a whole number {limit}, got {text!r}")
        return int(text)

    return parse


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return seconds


def main(command_line: list[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; ends with status 2 and one sentence where it cannot."""
    arguments = parser().parse_args(command_line)
    from mini_llm.hub.push import find_source

    try:
        check_packages()
        key = api_key(arguments.api_key)
        check_exposure(arguments.host, key)
        checkpoint = find_source(arguments.checkpoint).weights
        if not (checkpoint / "tokenizer.json").is_file():
            raise ValueError(f"CKPT: {checkpoint} has no tokenizer.json; put its tokenizer there")
        listener = listen(arguments.host, arguments.port)
        prepare_environment()
        os.environ["HF_HUB_OFFLINE"] = "1"  # whatever a request names, nothing is fetched

        serve = import_server()  # from here on torch and transformers are imported
        name = arguments.served_model_name or arguments.checkpoint.resolve().name
        serve(checkpoint, arguments, name=name, key=key, listener=listener)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def check_packages() -> None:
    """Raise ValueError, with what to do, where the extra "serve" is not installed."""
    from importlib.metadata import version
    from importlib.util import find_spec

    from packaging.version import Version

    missing = [package for package in PACKAGES if find_spec(package) is None]
    if Version(version("transformers")) < Version(TRANSFORMERS_MINIMUM):
        missing.append(f"transformers {TRANSFORMERS_MINIMUM} or newer")
    if missing:
        raise ValueError(
            f"serving needs {', '.join(missing)}; run: {sys.executable} -m pip install "
            "-c mini_llm/constraints.txt -e '.[serve]'"
        )


def import_server() -> Any:
    """The function that serves. Raises ValueError where transformers is not as we know it."""
    try:
        from .serving import serve
    except ImportError as error:
        from transformers import __version__

        raise ValueError(
            f"transformers {__version__} lacks what the server is built on ({error}); install the "
            "version of mini_llm/constraints.txt: ./launch.sh setup"
        ) from error
    return serve


def api_key(flag: str | None) -> str | None:
    """The key of the flag or the environment. Raises ValueError, without it, for a bad one."""
    source, key = ("--api_key", flag) if flag is not None else (KEY_VARIABLE, None)
    key = os.environ.get(KEY_VARIABLE) if key is None else key
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{source} must be printable ASCII characters without spaces, and not empty, to go "
            "into a header"
        )
    return key


def check_exposure(host: str, key: str | None) -> None:
    """Raise ValueError where other machines could reach the server and no key is set."""
    if key is not None or all(_is_loopback(address) for address in _addresses(host)):
        return
    raise ValueError(
        f"--host {host} can be reached from other machines, so a key is needed: set {KEY_VARIABLE} "
        "(or --api_key), or leave --host out to listen on this machine alone"
    )


def _addresses(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host!r} is no address of this machine ({error})") from error
    return [str(entry[4][0]) for entry in found]


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port in use is told before a model is loaded. Raises ValueError."""
    address = _addresses(host)[0]
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen()
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port} cannot be listened on ({error.strerror}); choose another "
            "--port, or 0 for a free one"
        ) from error
    return listener


if __name__ == "__main__":
    main()
