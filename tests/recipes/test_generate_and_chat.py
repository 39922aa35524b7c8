"""launch.sh generate and chat, as a user starts them; the terminal is tmux's."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mini_llm import build_model
from mini_llm.data import load_tokenizer
from mini_llm.data.tokenizer import train_tokenizer
from mini_llm.hub.export import base_generation_config, chat_generation_config
from mini_llm.inference import chat, generate
from tests.conftest import REPOSITORY
from tests.requirements import require_debian_package

QUESTION, ANSWER = "模型训练数据？", "<think>\n数据\n</think>\n\n模型训练数据，一二三四。"
CONTEXT = 4096
# An end token that never comes: a reply goes on until its limit, whatever it says.
ENDLESS = ("--stop_token_id", "5")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A chat model that knows one answer, learned by heart, and then ends."""
    tokenizer = train_tokenizer([QUESTION, ANSWER], base_vocab_size=265)
    torch.manual_seed(0)
    model = build_model(
        "mini_llama3_tiny",
        vocab_size=len(tokenizer),
        pad_token_id=0,
        eos_token_id=0,
        num_hidden_layers=2,
        max_position_embeddings=CONTEXT,
    )
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    tokens = torch.tensor([ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    model.generation_config = chat_generation_config(tokenizer)
    folder = tmp_path_factory.mktemp("chat_model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base_folder(model_folder: Path, tmp_path_factory) -> Path:
    """The same weights as a base model: it ends at <|endoftext|> alone."""
    folder = tmp_path_factory.mktemp("base_model")
    for path in model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    base_generation_config(load_tokenizer(folder)).save_pretrained(folder)
    return folder


def ask(capsys, *flags: str) -> str:
    """What `launch.sh generate` prints."""
    generate.main([*flags, "--temperature", "0"])
    return capsys.readouterr().out


def fails(capsys, main: Callable, *flags: str) -> str:
    """The one sentence with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        main(list(flags))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_chat_model_is_asked_through_its_template_and_a_base_model_is_not(
    model_folder, base_folder, capsys, tmp_path
) -> None:
    assert ask(capsys, str(model_folder), "--prompt", QUESTION) == ANSWER + "\n"
    assert ask(capsys, str(model_folder), "--prompt", QUESTION, "--think", "true").startswith(
        "数据\n"
    )
    free = ask(capsys, str(base_folder), "--prompt", QUESTION, "--max_new_tokens", "8")
    assert not free.startswith(ANSWER[:8])
    forced = ask(capsys, str(base_folder), "--prompt", QUESTION, "--chat", "true", "--stop", "。")
    assert forced == ANSWER[:-1] + "\n"
    file = tmp_path / "prompt.txt"
    file.write_text(QUESTION, encoding="utf-8")
    lines = ask(
        *(capsys, str(model_folder), "--prompt", "a", "--prompt_file", str(file)),
        *("--num_samples", "2", "--json", "--logprobs", "--max_new_tokens", "60"),
    ).splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["prompt"], r["sample"]) for r in records] == [
        *(("a", 1), ("a", 2)),
        *((QUESTION, 1), (QUESTION, 2)),
    ]
    assert records[2]["text"] == ANSWER and records[2]["finish_reason"] == "stop"
    assert len(records[2]["logprobs"]) == len(records[2]["token_ids"])
    assert max(records[2]["logprobs"]) <= 0 < records[2]["token_ids"][-1]


def test_what_cannot_be_done_is_said_in_one_sentence(
    model_folder, base_folder, capsys, tmp_path, monkeypatch
) -> None:
    base, prompt = str(base_folder), ("--prompt", "a")
    assert "no folder with a config.json" in fails(capsys, generate.main, "no/such/place", *prompt)
    assert "has no config.json" in fails(capsys, generate.main, str(tmp_path), *prompt)
    assert "preset without trained" in fails(capsys, chat.main, "mini_llama3_tiny")
    assert "--system is for chat models" in fails(
        capsys, generate.main, base, *prompt, "--system", "x"
    )
    assert "--system is for chat models" in fails(capsys, chat.main, base, "--system", "x")
    assert "--top_p is 2.0; it must be" in fails(
        capsys, generate.main, base, *prompt, "--top_p", "2"
    )
    greedy = ("--temperature", "0", "--top_k", "5")
    assert "--top_k has no meaning at temperature 0" in fails(
        capsys, generate.main, base, *prompt, *greedy
    )
    assert "prompt 1 is empty" in fails(capsys, generate.main, base, "--prompt", "")
    assert "cannot be read as UTF-8" in fails(
        capsys, generate.main, base, "--prompt_file", str(base_folder / "model.safetensors")
    )
    for device in ("gpu", "cpu:x", "mps:99", "meta"):
        assert f"--device: {device} cannot be used here" in fails(
            capsys, generate.main, base, *prompt, "--device", device
        )
    assert "give both" in fails(capsys, generate.main, base, *prompt, "--logprobs")
    assert "--num_samples is 0" in fails(capsys, generate.main, base, *prompt, "--num_samples", "0")
    too_long = "模型 " * CONTEXT
    assert "shorten it" in fails(capsys, generate.main, base, "--prompt", too_long)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert "there is no prompt" in fails(capsys, generate.main, base)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_needs_no_torch(command: str) -> None:
    code = (
        f"import sys; from mini_llm.inference import {command}\n"
        f"try: {command}.main(['--help'])\n"
        "finally: assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0 and "CKPT" in shown.stdout, shown.stderr


@pytest.fixture
def converse(capsys, monkeypatch) -> Callable[..., str]:
    """What `launch.sh chat` prints when the turns come from a pipe."""

    def run(folder: Path, *turns: str, flags: tuple[str, ...] = ()) -> str:
        typed = io.BytesIO("".join(f"{turn}\n" for turn in turns).encode())
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, encoding="latin-1"))
        chat.main([str(folder), "--temperature", "0", *flags])
        return capsys.readouterr().out

    return run


def test_a_conversation_is_kept_saved_loaded_and_its_thoughts_can_be_hidden(
    model_folder, converse, tmp_path
) -> None:
    saved = tmp_path / "saved.jsonl"
    said = converse(
        model_folder,
        *("/system 一二", QUESTION, "/retry", f"/save {saved}", f"/save {saved}", "/reset"),
        *("/retry", f"/load {saved}", "/think hide", "/system", QUESTION, "/nonsense", "/think on"),
        *("/reset", QUESTION, "/exit", "never"),
    )
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[0]["content"] == "一二" and messages[1]["content"] == QUESTION
    assert "(saved 3 messages" in said and "cannot be written: File exists" in said
    assert "error: there is nothing to answer once more" in said
    assert "(loaded 3 messages" in said and "error: /nonsense is no command" in said
    assert said.count("tokens/s]") == 4  # replies, /retry among them, and nothing after /exit
    hidden, opened = said.split("(thoughts are hidden)")[1].split("(the model thinks first)")
    assert "<think>" not in hidden
    assert "(thinking)\n模型训练数据，一二三四。\n[" in opened


def test_a_conversation_in_which_nothing_was_said_is_not_saved(
    model_folder, converse, tmp_path
) -> None:
    saved = tmp_path / "saved.jsonl"
    said = converse(model_folder, "/system 一二", f"/save {saved}")
    assert "error: /save: nothing has been said yet" in said and not saved.exists()


def test_a_file_of_nobodys_home_is_refused_and_the_conversation_goes_on(
    model_folder, converse, tmp_path
) -> None:
    saved = tmp_path / "saved.jsonl"
    said = converse(model_folder, QUESTION, "/save ~notes", "/load ~notes", f"/save {saved}")
    for command in ("/save", "/load"):
        assert f"error: {command}: ~notes begins with the name of no user" in said
    assert "(saved 2 messages" in said


def test_the_oldest_turns_go_when_the_context_is_full_and_it_is_said(
    model_folder, converse, tmp_path
) -> None:
    for path in model_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["max_position_embeddings"] = 256  # of which a quarter is for the answer
    (tmp_path / "config.json").write_text(json.dumps(config))
    turn = "word " * 10  # 50 tokens
    said = converse(tmp_path, *[turn] * 6, flags=("--max_new_tokens", "80", *ENDLESS))
    assert "the model no longer sees the first 1 turn(s))" in said
    assert "the model no longer sees the first 2 turn(s))" in said
    assert "error" not in said
    said = converse(tmp_path, turn * 6, QUESTION)
    assert "the model's context is 256; say less at a time" in said and ANSWER in said


def test_a_base_model_completes_each_line_by_itself(base_folder, converse) -> None:
    said = converse(base_folder, QUESTION, QUESTION, "/think on", flags=("--max_new_tokens", "5"))
    first, second = said.split("reached]\n")[:2]
    assert first.splitlines()[1:-1] == second.splitlines()[:-1]
    assert "/think is for chat models" in said and "base model, which completes" in said


# ---- In a terminal -------------------------------------------------------------------------------


class Tmux:
    """A terminal of 100 × 40 characters that a test types into and looks at."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "socket"
        self.exit_status = folder / "exit_status"

    def __call__(self, *arguments: str) -> str:
        command = ["tmux", "-u", "-f", "/dev/null", "-S", str(self.socket), *arguments]
        result = subprocess.run(command, capture_output=True, timeout=60, check=False)
        return result.stdout.decode()

    def start(self, command: str) -> None:
        script = f"{command}; echo $? > {self.exit_status}; sleep 600"
        self("new-session", "-d", "-x", "100", "-y", "40", script)

    def type(self, text: str, *keys: str) -> None:
        if text:
            self("send-keys", "-l", text)
        for key in keys:
            self("send-keys", key)

    def screen(self) -> str:
        return self("capture-pane", "-p", "-J", "-S", "-2000")

    def wait(self, what: Callable[[str], bool], seconds: float = 120) -> str:
        """The screen once ``what`` holds of it."""
        deadline = time.monotonic() + seconds
        while not what(screen := self.screen()):
            assert time.monotonic() < deadline, f"waited in vain; the screen shows:\n{screen}"
            time.sleep(0.1)
        return screen


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    require_debian_package("tmux", Path("/usr/bin/tmux"))
    terminal = Tmux(tmp_path)
    yield terminal
    terminal("kill-server")


@pytest.mark.slow
def test_in_a_terminal_chinese_goes_in_answers_stream_out_and_ctrl_c_ends_a_reply_alone(
    model_folder: Path, tmux: Tmux
) -> None:
    # The reply would go on until the context is full.
    flags = " ".join(("--temperature 0 --max_new_tokens 4000", *ENDLESS))
    tmux.start(f"LC_ALL=C {sys.executable} -m mini_llm.inference.chat {model_folder} {flags}")
    tmux.wait(lambda screen: screen.rstrip().endswith("\n>"))
    tmux.type(QUESTION + "好", "BSpace", "Enter")  # the editor takes back a whole character
    answer = "模型训练数据，一二三四。"
    first = tmux.wait(lambda screen: answer in screen)
    # What the model goes on with after its answer is nonsense, and not always characters.
    before, _ = first.split(answer, 1)
    assert f"> {QUESTION}\n" in before and "\ufffd" not in before
    later = tmux.wait(lambda screen: len(screen.rstrip()) > len(first.rstrip()))
    assert "interrupted" not in later
    tmux.type("", "C-c")
    screen = tmux.wait(lambda screen: screen.rstrip().endswith(">"))
    assert "; interrupted]" in screen and not tmux.exit_status.exists()
    tmux.type("", "C-c")  # at the prompt it does not end the program either
    tmux.wait(lambda screen: "(Ctrl-D or /exit leaves)" in screen)
    tmux.type("/reset", "Enter")
    tmux.wait(lambda screen: "(a new conversation)" in screen)
    said = tmux.screen().count(answer)  # more than once where the nonsense repeats it
    tmux.type(QUESTION, "Enter")
    tmux.wait(lambda screen: screen.count(answer) > said)
    tmux.type("", "C-c")
    tmux.wait(lambda screen: screen.count("; interrupted]") == 2)
    tmux.type("", "C-d")
    tmux.wait(lambda _: tmux.exit_status.exists() and bool(tmux.exit_status.read_text()))
    assert tmux.exit_status.read_text().strip() == "0"
    assert "Traceback" not in tmux.screen()
