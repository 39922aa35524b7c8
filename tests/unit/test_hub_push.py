"""Pushing to a hub on this machine through huggingface_hub's own client, and loading what came."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from mini_llm import build_model
from mini_llm.data.tokenizer import load_tokenizer
from mini_llm.hub import __main__ as command
from mini_llm.hub import background_push
from mini_llm.hub import push as pushing
from mini_llm.hub.background_push import BackgroundPush
from mini_llm.hub.export import base_generation_config
from mini_llm.hub.model_card import from_hub
from mini_llm.hub.push import PushFailedError, check_target, find_source, push
from mini_llm.models import pretrained_folder
from mini_llm.training.arguments import PretrainArguments
from mini_llm.training.run_folder import write_config
from mini_llm.training.sizes import count_parameters
from tests.conftest import TINY_MODELS
from tests.unit.hub_upload_server import HANG, READER, WRITER, HubUploadServer
from tests.unit.prepare_fixtures import make_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
REPO = "owner/tiny"
SECRET = "wandb-key-0123456789"
DEEPSEEK = "mini_deepseekv3_tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a model with experts and an MTP layer, with what must never leave it."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    tokenizer: Any = load_tokenizer(make_tokenizer(folder.parent / "tokenizer"))
    torch.manual_seed(0)
    model: Any = build_model(DEEPSEEK, vocab_size=len(tokenizer), **TINY_MODELS[DEEPSEEK])
    model.generation_config = base_generation_config(tokenizer)
    args = PretrainArguments(
        output_dir=str(folder),
        model=DEEPSEEK,
        tokenizer="somewhere/private/tokenizer",
        data={
            "web/a|zh": {"path": "/home/somebody/packed", "weight": 3},
            "books": {"path": ["hf://datasets/owner/books@main/a.parquet"], "weight": 1},
        },
        max_steps=20,
        hub_license="apache-2.0",
        hub_language="zh, en",
    )
    for place in (folder / "checkpoints/step-10/model", folder / "final"):
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        (place / "optimizer.pt").write_bytes(SECRET.encode())
        (place / ".env").write_text(f"WANDB_API_KEY={SECRET}")
        (place / "engine").mkdir()
        (place / "engine/model.safetensors").write_text(SECRET)
    (folder / "checkpoints/step-10/engine").mkdir()
    (folder / "checkpoints/step-10/engine/config.json").write_text(f'"{SECRET}"')
    (folder / "checkpoints/step-10/state.json").write_text('{"step": 10}')
    (folder / "checkpoints/step-10/files.json").write_text("{}")
    write_config(folder, args)
    facts = {
        "recipe": "pretrain",
        "from_hub": from_hub(args),
        "parameters": dataclasses.asdict(count_parameters(model)),
        "world_size": 2,
        "distributed_type": "DEEPSPEED",
        "zero_stage": 1,
        "device": "cpu",
        "expert_parallel_size": 1,
        "versions": {"torch": "1", "transformers": "2"},
    }
    (folder / "run.json").write_text(json.dumps(facts))
    lines = [
        {"step": 1, "train/loss": 9.0, "train/tokens": 100},
        {
            **{"step": 10, "train/loss": 5.0, "train/tokens": 1000, "data/web/a|zh/tokens": 750},
            **{"data/books/tokens": 250, "eval/books/loss": 4.5, "eval/books/bits_per_byte": 1.25},
        },
        {
            **{"step": 20, "train/loss": 3.0, "train/tokens": 2000, "data/web/a|zh/tokens": 1500},
            **{"data/books/tokens": 500, "eval/books/loss": 2.5, "eval/books/bits_per_byte": 0.75},
            **{"eval/web/a|zh/loss": None, "eval/web/a|zh/bits_per_byte": None},
        },
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 21, "half a li')
    (folder / "samples.txt").write_text("=== step 20: 1\n```` fences ```\n# no heading\x1b[31m\n")
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubUploadServer]:
    """A hub, and a client that goes there with the writer's token."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # of processes started here
    hub = HubUploadServer()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(pushing, "FIRST_WAIT_SECONDS", 0.01)
    level = huggingface_hub.utils.logging.get_verbosity()
    yield hub
    hub.close()
    huggingface_hub.utils.logging.set_verbosity(level)
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


def environment(hub: str, token: str = WRITER) -> dict[str, str]:
    """Variables of a process that pushes to ``hub``."""
    variables = {"HF_ENDPOINT": hub, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    variables |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    return {**os.environ, **variables}


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20)).logits


def test_a_pushed_run_is_downloaded_again_and_loads_in_stock_transformers(
    run: Path, server: HubUploadServer, tmp_path: Path
) -> None:
    url = push(run, REPO)
    repository = server.repositories[REPO]
    assert repository.private
    assert url.startswith(f"{server.url}/{REPO}/commit/")
    weights = (run / "final/model.safetensors").read_bytes()
    assert repository.files()["model.safetensors"] == weights
    assert len(server.verified) == 3  # weights, tokenizer, picture
    again = Path(snapshot_download(REPO, local_dir=tmp_path / "again"))
    assert torch.equal(logits_of(again), logits_of(run / "final"))
    ids = AutoTokenizer.from_pretrained(again)("训练 a model").input_ids
    assert ids == AutoTokenizer.from_pretrained(run / "final")("训练 a model").input_ids
    assert json.loads((again / "generation_config.json").read_text())["do_sample"] is True


def test_a_model_that_the_hub_does_not_give_is_answered_in_one_short_sentence(
    server: HubUploadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for offline, reason in (
        (False, "it has no such model, or shows it to others alone"),
        (True, "it is not cached, and the hub cannot be asked"),
    ):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(ValueError) as refused:
            pretrained_folder("owner/none")
        assert str(refused.value) == (
            "--model: owner/none is no local folder and cannot be had from the hub "
            f"({reason}); check the name, HF_ENDPOINT and, for a private model, HF_TOKEN"
        )


def test_only_the_model_leaves_and_never_a_token(
    run: Path, server: HubUploadServer, capfd: pytest.CaptureFixture[str]
) -> None:
    for place in (run, run / "checkpoints/step-10", run / "final"):
        command.main(["push", str(place), "--repo_id", REPO])
    assert set(server.repositories[REPO].files()) == {
        *(".gitattributes", "README.md", "config.json", "generation_config.json", "loss.png"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    sent = server.bodies()
    assert b"apache-2.0" in sent  # the bodies are read as they should be
    assert SECRET.encode() not in sent and WRITER.encode() not in sent
    assert b"somebody" not in sent and b"somewhere" not in sent  # paths of this machine
    out, err = capfd.readouterr()
    assert out.count("pushed ") == 3 and WRITER not in out + err
    shown = [(kind, headers.get("authorization")) for kind, headers, _ in server.received]
    assert {token for kind, token in shown if kind != "upload"} == {f"Bearer {WRITER}"}
    assert {token for kind, token in shown if kind == "upload"} == {None}  # storage needs none
    written = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in written if WRITER.encode() in path.read_bytes()]


def test_a_file_that_holds_a_token_stops_the_push(
    run: Path, server: HubUploadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "mine-of-another-form")
    for secret in ("mine-of-another-form", "hf_" + 17 * "a1"):
        folder = tmp_path / secret[:4]
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).symlink_to(run / "final" / name)
        (folder / "README.md").write_text(f"my token is {secret}")
        with pytest.raises(ValueError, match=r"README.md holds a token of the hub"):
            push(folder, REPO)
    assert not server.received


def test_a_second_push_sends_no_weights_again_and_makes_no_empty_commit(
    run: Path, server: HubUploadServer
) -> None:
    push(run / "checkpoints/step-10", REPO)
    sent = server.count("upload")
    push(run / "final", REPO)  # the same weights, another card and picture
    assert server.count("upload") == sent + 1
    repository = server.repositories[REPO]
    assert [message for _, message, _ in repository.branches["main"]] == [
        *("initial commit", "Weights of step 10", "Weights of final")
    ]
    push(run / "final", REPO)
    assert server.count("upload") == sent + 1 and len(repository.branches["main"]) == 3


def test_public_branch_message_licence_and_language_are_what_the_flags_say(
    run: Path, server: HubUploadServer
) -> None:
    flags = ["--public", "--revision", "try/one", "--commit_message", "A try", "--license", "mit"]
    command.main(["push", str(run), "--repo_id", REPO, *flags, "--language", "fr"])
    repository = server.repositories[REPO]
    assert not repository.private
    assert list(repository.files("main")) == [".gitattributes"]
    assert repository.commit("try/one")[1] == "A try"
    card = repository.files("try/one")["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert (metadata["license"], metadata["language"]) == ("mit", ["fr"])


def test_drop_mtp_leaves_the_mtp_layers_out_so_that_stock_loads_without_a_warning(
    run: Path, server: HubUploadServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    push(run, REPO, drop_mtp=True)
    again = Path(snapshot_download(REPO, local_dir=tmp_path / "again"))
    assert json.loads((again / "config.json").read_text())["num_nextn_predict_layers"] == 0
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        _, info = AutoModelForCausalLM.from_pretrained(again, output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert torch.equal(logits_of(again), logits_of(run / "final"))
    whole = json.loads((run / "run.json").read_text())["parameters"]
    card = (again / "README.md").read_text()
    assert f"of {whole['total'] - whole['mtp']:,} parameters" in card
    assert "multi-token prediction" not in card


def test_card_tells_of_the_run_up_to_the_step_of_the_weights(
    run: Path, server: HubUploadServer
) -> None:
    push(run / "checkpoints/step-10", REPO)
    early = server.repositories[REPO].files()["README.md"].decode()
    push(run, REPO)
    card = server.repositories[REPO].files()["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata == {
        "license": "apache-2.0",
        "language": ["zh", "en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mini-llm", "deepseek_v3", "pretraining"],
        "datasets": ["owner/books"],
    }
    parameters = json.loads((run / "run.json").read_text())["parameters"]
    for fact in (
        f"| parameters | {parameters['total']:,} |",
        f"| active parameters a token | {parameters['active']:,} |",
        "| web/a\\|zh | 75.0% | 1,500 |",
        "| books | 25.0% | 500 |",
        "| peak learning rate | 0.0003 |",
        "| schedule | cosine |",
        "| warmup steps | 1 |",
        "| engine | DeepSpeed ZeRO-1 on 2 rank(s), cpu |",
        "| books | 2.5000 | 0.7500 |",
        "| web/a\\|zh | not finite | not finite |",
        "\n# tiny\n",
        "![loss over optimizer steps](loss.png)",
        f'AutoModelForCausalLM.from_pretrained("{REPO}")',
        "The weights are under `apache-2.0`.",
    ):
        assert fact in card, fact
    # A fence longer than any in the text, and no control characters of a terminal.
    assert "\n`````text\n=== step 20: 1\n```` fences ```\n# no heading�[31m\n`````\n" in card
    for fact in ("| books | 25.0% | 250 |", "| books | 4.5000 | 1.2500 |", "for 10 steps"):
        assert fact in early and fact not in card, fact
    assert "Measured at step" not in early + card  # it was at the step of the weights
    assert "## Samples" not in early  # those are of a later step


def test_card_of_a_step_that_was_saved_and_not_logged_tells_its_own_step_and_tokens(
    run: Path, server: HubUploadServer, tmp_path: Path
) -> None:
    folder = tmp_path / "one"
    shutil.copytree(run, folder)
    (folder / "checkpoints/step-10").rename(folder / "checkpoints/step-13")
    state = {"step": 13, "tokens": {"web/a|zh": 975, "books": 325}}
    (folder / "checkpoints/step-13/state.json").write_text(json.dumps(state))
    push(folder / "checkpoints/step-13", REPO)
    card = server.repositories[REPO].files()["README.md"].decode()
    for fact in (
        "for 13 steps.",
        "| optimizer steps | 13 |",
        "| tokens seen | 1,300 |",
        "| web/a\\|zh | 75.0% | 975 |",
        "a small model that saw 1,300 tokens",
        "| books | 4.5000 | 1.2500 |\n\nMeasured at step 10.",  # the last one before it
    ):
        assert fact in card, fact


@pytest.mark.parametrize("kind", ["create", "preupload", "batch", "upload", "verify", "commit"])
def test_a_request_that_fails_once_is_made_again(
    run: Path, server: HubUploadServer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the client's own retries
    server.faults[kind] = [503]
    push(run, REPO)
    assert server.repositories[REPO].files()["config.json"]
    assert server.count(kind) >= 2


def test_a_hub_that_goes_on_failing_ends_the_push_after_some_attempts(
    run: Path, server: HubUploadServer
) -> None:
    server.faults["create"] = [500] * 100
    with pytest.raises(PushFailedError, match=f"{server.url} answered 500"):
        push(run, REPO)
    assert server.count("create") == pushing.ATTEMPTS


def test_a_hub_that_hangs_ends_the_push(
    run: Path, server: HubUploadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "REQUEST_SECONDS", 0.3)
    server.faults["create"] = [HANG] * 100
    with pytest.raises(PushFailedError, match=r"cannot be reached \(ReadTimeout"):
        push(run, REPO)


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("hf_wrong", r"does not accept the token \(401\); run `hf auth login`"),
        (READER, rf"the token may not write to {REPO} \(403\)"),
    ],
)
@pytest.mark.parametrize("is_there", [False, True])
def test_a_refused_token_is_one_sentence_and_not_tried_again(
    run: Path,
    server: HubUploadServer,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    sentence: str,
    is_there: bool,
) -> None:
    if is_there:
        push(run, REPO)
    commits = server.count("commit")
    monkeypatch.setenv("HF_TOKEN", token)
    before = server.count("create")
    with pytest.raises(PushFailedError, match=sentence) as caught:
        push(run, REPO)
    assert token not in str(caught.value) and "\n" not in str(caught.value)
    assert server.count("create") == before + 1 and server.count("commit") == commits


def test_what_cannot_be_pushed_is_said_before_anything_is_sent(
    run: Path, server: HubUploadServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, sentence in (("tiny", "give owner/name"), ("a/b--c", "Cannot have --")):
        with pytest.raises(ValueError, match=f"--repo_id.*{sentence}"):
            push(run, name)
    with pytest.raises(ValueError, match="has no config.json with model.safetensors"):
        push(tmp_path, REPO)
    (tmp_path / "checkpoints/.step-3.partial/model").mkdir(parents=True)
    with pytest.raises(ValueError, match="neither final/ nor a whole checkpoint"):
        push(tmp_path, REPO)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no token for the hub; run `hf auth login`"):
        push(run, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"):
        check_target(REPO, flag="--hub_model_id")
    assert not server.received


def test_a_run_folder_means_its_final_model_else_its_newest_whole_checkpoint(
    run: Path, tmp_path: Path
) -> None:
    assert find_source(run).weights == run / "final" == find_source(run / "final").weights
    of_step = find_source(run / "checkpoints/step-10")
    assert (of_step.weights.name, of_step.run, of_step.step) == ("model", run, 10)
    assert find_source(run / "checkpoints/step-10/model") == of_step
    for name in ("checkpoints", "run.json"):
        (tmp_path / name).symlink_to(run / name)
    assert find_source(tmp_path).step == 10
    (tmp_path / "checkpoints").unlink()
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    for copy in ("step-best", "step-10-old", "step-900.bak"):  # of a user, by hand
        shutil.copytree(run / "checkpoints/step-10", tmp_path / "checkpoints" / copy)
    assert find_source(tmp_path).weights == tmp_path / "checkpoints/step-10/model"
    (tmp_path / "checkpoints/step-10/files.json").unlink()
    with pytest.raises(ValueError, match="step-10 is not whole: it is being written"):
        find_source(tmp_path / "checkpoints/step-10")
    alone = tmp_path / "copied" / "out"
    shutil.copytree(run / "final", alone)
    assert find_source(alone).run is None  # its README.md stays as it is


def test_a_hub_without_xet_is_told_apart_from_one_that_is_not_there(
    run: Path, server: HubUploadServer
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mini_llm.hub", "push", str(run), "--repo_id", REPO],
        cwd=REPOSITORY,
        env={**environment(server.url), "HF_HUB_DISABLE_XET": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    sentence = f"error: {server.url} has no Xet storage; set HF_HUB_DISABLE_XET=1\n"
    assert (done.returncode, done.stderr) == (2, sentence)


def background(run: Path, tmp_path: Path, **flags: Any) -> BackgroundPush:
    """The push of a run that is training, in a folder of its own, with a checkpoint step-10."""
    folder = tmp_path / "training"
    (folder / "checkpoints/step-10").mkdir(parents=True)
    for name in ("run.json", "config.yaml", "metrics.jsonl"):
        (folder / name).write_bytes((run / name).read_bytes())
    for path in ("state.json", "model"):
        source, target = run / "checkpoints/step-10" / path, folder / "checkpoints/step-10" / path
        if source.is_dir():
            target.mkdir()
            for file in source.iterdir():
                if file.is_file():
                    (target / file.name).write_bytes(file.read_bytes())
        else:
            target.write_bytes(source.read_bytes())
    settings = {"push_to_hub": True, "hub_model_id": REPO, "max_steps": 20, **flags}
    args = PretrainArguments(output_dir=str(folder), model="m", tokenizer="t", **settings)
    return BackgroundPush(args, rank=0)


ONE_RANK = SimpleNamespace(device=torch.device("cpu"), reduce=lambda flag, how: flag)


def test_a_checkpoint_that_is_removed_meanwhile_is_pushed_whole(
    run: Path, server: HubUploadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in environment(server.url).items():
        monkeypatch.setenv(name, value)
    pusher = background(run, tmp_path)
    checkpoint = pusher.run / "checkpoints/step-10"
    pusher.send(checkpoint)
    shutil.rmtree(checkpoint)
    pusher.finish(ONE_RANK)
    repository = server.repositories[REPO]
    assert repository.commit("main")[1] == "Weights of step 10"
    weights = (run / "checkpoints/step-10/model/model.safetensors").read_bytes()
    assert repository.files()["model.safetensors"] == weights
    assert f"pushed step-10 to {server.url}/{REPO}/commit/" in capsys.readouterr().out
    assert not (pusher.run / ".push").exists()
    assert WRITER not in (pusher.run / "logs/push.log").read_text()


def test_a_newer_save_replaces_one_that_waits(
    run: Path, server: HubUploadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pusher = background(run, tmp_path)
    first, pushed = pusher.run / "checkpoints/step-10", []
    release = threading.Event()

    def slow_push(folder: Path) -> None:
        pushed.append(folder.name)
        assert release.wait(60)

    monkeypatch.setattr(pusher, "_push", slow_push)
    for step in (10, 11, 12, 13):
        checkpoint = first.rename(first.with_name(f"step-{step}"))
        first = checkpoint
        pusher.send(checkpoint)
        while not pushed:
            time.sleep(0.01)
    assert pushed == ["step-10"]
    assert sorted(path.name for path in (pusher.run / ".push").iterdir()) == ["step-10", "step-13"]
    release.set()
    pusher.finish(ONE_RANK)
    assert pushed == ["step-10", "step-13"]


def test_the_end_waits_for_a_hub_that_hangs_no_longer_than_told(
    run: Path, server: HubUploadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in environment(server.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(background_push, "CHECK_SECONDS", 0.2)
    server.faults["whoami"] = server.faults["create"] = [HANG] * 9
    pusher = background(run, tmp_path, hub_wait_seconds=1)
    begin = time.monotonic()
    pusher.send(pusher.run / "checkpoints/step-10")
    pusher.finish(ONE_RANK)
    assert time.monotonic() - begin < 30  # not the 60 s of a request
    assert pusher._process is None or pusher._process.poll() is not None
    text = capsys.readouterr().out
    assert text.count("ReadTimeout") == 1  # the question at the start
    assert text.count(f"the push to {REPO} did not end in time") == 1
    assert f"python -m mini_llm.hub push {pusher.run} --repo_id {REPO}" in text


def test_a_refused_token_is_said_once_and_stops_nothing(
    run: Path, server: HubUploadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in environment(server.url, token="hf_wrong").items():
        monkeypatch.setenv(name, value)
    pusher = background(run, tmp_path)
    pusher.send(pusher.run / "checkpoints/step-10")
    pusher.finish(ONE_RANK)
    text = capsys.readouterr().out
    assert text.count("does not accept the token (401)") == text.count("to repeat it: ") == 1
    assert "hf_wrong" not in text + (pusher.run / "logs/push.log").read_text()
    assert server.count("whoami") == server.count("create") == 1  # asked at the start, then tried


def test_the_command_is_light_and_says_one_sentence_with_status_2(run: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['hub', 'push', {str(run)!r}, '--repo_id', {REPO!r}]\n"
        "try:\n    runpy.run_module('mini_llm.hub', run_name='__main__')\n"
        "finally:\n    print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**environment("http://127.0.0.1:9"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == "False False\n"
    assert done.stderr.startswith(f"error: --repo_id {REPO}: HF_HUB_OFFLINE or ")
    assert done.stderr.count("\n") == 1
