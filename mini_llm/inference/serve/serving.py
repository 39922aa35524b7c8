"""Loading the checkpoint and running the server around it."""

import argparse
import asyncio
import signal
import socket
from pathlib import Path
from typing import Any

import transformers
import uvicorn
from transformers import AutoModelForCausalLM

from mini_llm.data.tokenizer import load_tokenizer
from mini_llm.device import choose_device
from mini_llm.inference.ends import end_tokens, is_chat_model
from mini_llm.models import load_trained

from .app import build_app
from .engines import SECONDS_TO_STOP, Engine, make_engine
from .guard import Limits
from .handlers import Served
from .metrics import Metrics

SECONDS_TO_DRAIN = 5  # that running answers get after a signal to end
SECONDS_FOR_A_BODY = 30
SECONDS_TO_READ = 30  # that a client gets to take the end of its answer
# What answers follow of a checkpoint's generation_config.json, and what says nothing of them.
FOLLOWED = {"do_sample", "temperature", "top_k", "top_p", "eos_token_id"}
OF_NO_MATTER = {
    *("bos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"),
    *("transformers_version", "_from_model_config"),
}


def serve(
    checkpoint: Path,
    arguments: argparse.Namespace,
    *,
    name: str,
    key: str | None,
    listener: socket.socket,
) -> None:
    """Answer requests until a signal comes. Raises ValueError for a checkpoint that cannot be."""
    # generate() and the cache warn again and again, of what is meant here.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = choose_device(arguments.device)
    tokenizer = load_tokenizer(checkpoint)
    dtype = arguments.dtype or ("float32" if device.type == "cpu" else "auto")
    # The stock class: what continuous batching is made for and tested with.
    load = AutoModelForCausalLM.from_pretrained
    try:
        model = load_trained(load, checkpoint, dtype=dtype, local_files_only=True)
    except ValueError as error:
        raise ValueError(f"CKPT: {checkpoint} cannot be opened ({error})") from error
    model = model.to(device).eval()
    defaults = model.generation_config
    ends = end_tokens(tokenizer, defaults)
    context = model.config.max_position_embeddings
    rows = arguments.max_concurrent_requests
    engine = make_engine(model, ends, rows=rows, context=context)

    served = Served(
        name=name,
        tokenizer=tokenizer,
        is_chat_model=is_chat_model(tokenizer, defaults),
        generation_config=defaults,
        vocab_size=model.config.vocab_size,
        engine=engine,
        slots=asyncio.Semaphore(rows),
        metrics=Metrics(),
        context=context,
        max_prompt_tokens=arguments.max_prompt_tokens or context,
        max_new_tokens=arguments.max_new_tokens_limit or context,
        seconds=arguments.request_timeout,
    )
    limits = Limits(
        max_body_bytes=arguments.max_body_bytes,
        body_seconds=SECONDS_FOR_A_BODY,
        seconds=arguments.request_timeout + SECONDS_TO_READ,
        max_requests=rows + arguments.max_waiting_requests,
    )
    app = build_app(
        served,
        limits=limits,
        key=key,
        cors_origins=arguments.cors_origins,
        created=int((checkpoint / "config.json").stat().st_mtime),
    )
    if ignored := not_followed(defaults):
        print(f"not followed of generation_config.json: {ignored}", flush=True)
    run(app, engine, listener, f"{name}, {engine.name}, {model.dtype} on {model.device}")


def not_followed(config: Any) -> str:
    """What a generation config sets and no answer follows, e.g. "min_p 0.1, num_beams 2", or ""."""
    return ", ".join(
        f"{field} {value}"
        for field, value in config.to_diff_dict().items()
        if value is not None and field not in FOLLOWED | OF_NO_MATTER
    )


def run(app: Any, engine: Engine, listener: socket.socket, what: str) -> None:
    """Serve the app until SIGTERM or Ctrl-C, give running answers a few seconds, and return."""
    # uvicorn raises the signal again when it has shut down, which would end us by it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=SECONDS_TO_DRAIN + SECONDS_TO_STOP,
    )
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"serving {what}\nlistening on http://{host}:{port}/v1 (Ctrl-C ends it)", flush=True)
    asyncio.run(_serve_and_drain(uvicorn.Server(config), listener, engine))


async def _serve_and_drain(server: uvicorn.Server, listener: socket.socket, engine: Engine) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.should_exit and not serving.done():
        await asyncio.sleep(0.1)
    await asyncio.wait({serving}, timeout=SECONDS_TO_DRAIN)
    await asyncio.to_thread(engine.close)  # tells those whose answers still run
    await serving
