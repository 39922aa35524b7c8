"""What the command line refuses, before a model is loaded."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mini_llm.inference.serve import __main__ as command
from tests.conftest import REPOSITORY

KEY = "not-to-be-seen"


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """As much of one as is looked at before everything else was found to be right."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "tokenizer.json").touch()
    return str(tmp_path)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(command.KEY_VARIABLE, raising=False)


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert not output.out
    return output.err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_a_public_address_needs_a_key(
    checkpoint: str, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal([checkpoint, "--host", host], capsys)
    assert error.count("\n") == 1
    assert error.startswith(f"error: --host {host} can be reached from other machines")
    assert command.KEY_VARIABLE in error


def test_launch_sh_serves(checkpoint: str) -> None:
    environment = {**os.environ, "MINI_LLM_VENV": str(Path(sys.executable).parents[1])}
    done = subprocess.run(
        ["./launch.sh", "serve", checkpoint, "--host", "0.0.0.0"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --host 0.0.0.0 can be reached from other machines")


def test_a_loopback_address_needs_none_and_a_public_one_takes_one() -> None:
    for host in ("127.0.0.1", "127.8.9.1", "localhost", "::1"):
        command.check_exposure(host, None)
    command.check_exposure("0.0.0.0", KEY)


def test_a_host_that_is_none_is_refused(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal([checkpoint, "--host", "no host"], capsys)
    assert error.startswith("error: --host 'no host' is no address")


def test_a_port_in_use_is_told_before_the_model_is_loaded(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        error = refusal([checkpoint, "--port", port], capsys)
    assert error.startswith(f"error: --host 127.0.0.1 --port {port} cannot be listened on")
    assert "in use" in error and error.count("\n") == 1


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "line\nbreak"])
@pytest.mark.parametrize("source", ["--api_key", "MINI_LLM_API_KEY"])
def test_a_key_that_no_client_could_send_is_refused_without_being_shown(
    checkpoint: str,
    key: str,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [checkpoint]
    if source == "--api_key":
        words += ["--api_key", key]
    else:
        monkeypatch.setenv(source, key)
    error = refusal(words, capsys)
    assert error.startswith(f"error: {source} must be printable ASCII")
    assert not key or key not in error


def test_the_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.api_key(None) is None
    monkeypatch.setenv(command.KEY_VARIABLE, "of-the-environment")
    assert command.api_key(None) == "of-the-environment"
    assert command.api_key(KEY) == KEY


def test_a_folder_without_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no config.json with model.safetensors" in refusal([str(tmp_path)], capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "--port: must be a whole number from 0 to 65535"),
        (["--max_concurrent_requests", "0"], "must be a whole number of at least 1"),
        (["--request_timeout", "nan"], "must be a number of seconds above 0"),
        (["--max_body_bytes", "1e6"], "must be a whole number of at least 1"),
        (["--port", "0", "--device", "tpu"], "--device: tpu cannot be used here"),
        (["--port", "0", "--device", "meta"], "--device: meta cannot be used here"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_a_bad_flag_is_refused(
    checkpoint: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal([checkpoint, *flags], capsys)


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from mini_llm.inference.serve.__main__ import parser; parser().format_help(); "
        "sys.exit(bool({'torch', 'transformers', 'fastapi'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_missing_packages_are_named_with_the_command_that_brings_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "PACKAGES", ("json", "a_package_that_is_not_there"))
    with pytest.raises(
        ValueError, match="serving needs a_package_that_is_not_there; run: "
    ) as error:
        command.check_packages()
    monkeypatch.setattr(command, "TRANSFORMERS_MINIMUM", "99.1")
    with pytest.raises(ValueError, match="is_not_there, transformers 99.1 or newer; run: "):
        command.check_packages()
    assert f"{sys.executable} -m pip install -c mini_llm/constraints.txt -e '.[serve]'" in str(
        error.value
    )


def test_another_transformers_is_told_in_a_sentence(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "mini_llm.inference.serve.serving", raising=False)
    monkeypatch.delitem(sys.modules, "mini_llm.inference.serve.app", raising=False)
    monkeypatch.delitem(sys.modules, "mini_llm.inference.serve.handlers", raising=False)
    monkeypatch.setitem(sys.modules, "transformers.cli.serving.chat_completion", None)
    error = refusal([checkpoint, "--port", "0"], capsys)
    assert re.match(r"error: transformers \d+\.\S+ lacks what the server is built on", error)


def test_the_python_example_says_in_one_sentence_that_no_server_answers() -> None:
    done = subprocess.run(
        [sys.executable, "examples/chat_client.py"],
        cwd=REPOSITORY,
        env={**os.environ, "OPENAI_BASE_URL": "http://127.0.0.1:9/v1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "no server answers at http://127.0.0.1:9/v1" in line and "./launch.sh serve" in line
