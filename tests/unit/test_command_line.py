"""Commands answer a wrong command line in one sentence."""

import pytest

from data_tools import (
    download,
    make_quickstart_corpus,
    prepare_pretrain,
    prepare_sft,
    sample,
    train_tokenizer,
)
from mini_llm import dashboard, doctor
from mini_llm.bench.__main__ import build_parser
from mini_llm.command_line import RaisingParser, UsageError
from mini_llm.hub.__main__ import main as hub
from mini_llm.inference import chat, generate
from mini_llm.inference.serve.__main__ import parser as serve_parser
from mini_llm.plots.__main__ import main as plots

COMMANDS = {
    "bench": build_parser().parse_args,
    "chat": chat.main,
    "dashboard": dashboard.main,
    "doctor": doctor.main,
    "download": download.parse_arguments,
    "generate": generate.main,
    "hub": hub,
    "make_quickstart_corpus": make_quickstart_corpus.parse_arguments,
    "plots": plots,
    "prepare_pretrain": prepare_pretrain.parse_arguments,
    "prepare_sft": prepare_sft.parse_arguments,
    "sample": sample.parse_arguments,
    "serve": serve_parser().parse_args,
    "train_tokenizer": train_tokenizer.parse_arguments,
}


def said(capsys, command, words):
    with pytest.raises(SystemExit) as end:
        command(words)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_command_line_is_answered_in_one_sentence(name, capsys):
    assert said(capsys, COMMANDS[name], ["--nonsense", "1"]).startswith("error: ")


def test_an_unknown_flag_is_named_with_the_nearest(capsys):
    line = said(capsys, COMMANDS["generate"], ["folder", "--temprature=1"])
    assert line == "error: unknown argument --temprature; the nearest is --temperature (see --help)"


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["step", "--step", "3"], "--steps"), (["learning", "--models", "a"], "--model")],
)
def test_an_unknown_flag_of_a_subcommand_is_named_with_its_nearest(words, meant, capsys):
    line = said(capsys, COMMANDS["bench"], words)
    assert line == f"error: unknown argument {words[1]}; the nearest is {meant} (see --help)"


def test_a_command_that_answers_for_itself_gets_the_same_sentence_raised():
    parser = RaisingParser()
    parser.add_argument("--rows")
    with pytest.raises(UsageError, match="^unknown argument --row; the nearest is --rows"):
        parser.parse_args(["--row=1"])


def test_help_names_defaults_and_none_of_a_flag_without_one(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        COMMANDS["make_quickstart_corpus"](["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "folder to write --max_bytes" in text and "(default: 8000000)" in text
