"""llama.cpp's own server on a GGUF file, in a process of its own: it aborts where it is wrong.

answers = ask(model, [("/tokenize", {"content": "text"}), …])
"""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

CONTEXT = 512  # tokens


def ask(model: Path, requests: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The server's answers to requests (path, JSON), one after the other."""
    given = json.dumps({"model": str(model), "requests": requests})
    done = subprocess.run(
        [sys.executable, __file__], input=given, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def main() -> None:
    """Answer the requests on standard input, on the last line of standard output."""
    import xllamacpp

    given = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = given["model"]
    params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    # By default it keeps keys and values in fp16, which would hide small errors behind its own.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    answers = []
    for path, body in given["requests"]:
        request = urllib.request.Request(
            server.listening_address + path,
            json.dumps(body).encode() if body else None,  # nothing to send: a GET
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            answers.append(json.load(response))
    print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
