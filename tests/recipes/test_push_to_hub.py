"""Pushing while training, to a hub on this machine and to one that is not there."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import TINY_MODELS, TinyData
from tests.launching import TINY_RUN, launch_several, series
from tests.unit.hub_upload_server import HANG, WRITER, HubUploadServer

MODEL, REPO = "mini_deepseekv3_tiny", "owner/tiny"
NO_HUB = "http://127.0.0.1:9"


@pytest.fixture
def servers() -> Iterator[tuple[HubUploadServer, HubUploadServer]]:
    """One that works and one that never answers."""
    working, hanging = HubUploadServer(), HubUploadServer()
    hanging.faults["create"] = [HANG] * 9
    yield working, hanging
    working.close()
    hanging.close()


@pytest.mark.slow
def test_a_run_pushes_at_saves_and_end_and_a_hub_that_fails_changes_nothing_but_one_line(
    tiny_data: TinyData, servers: tuple[HubUploadServer, HubUploadServer], tmp_path: Path
) -> None:
    server, hanging = servers
    flags = [*TINY_RUN, *tiny_data.flags, "--model", MODEL, "--expert_parallel_size", "2"]
    flags += ["--model_overrides", json.dumps(TINY_MODELS[MODEL]), "--max_steps", "4"]
    flags += ["--save_steps", "2", "--save_total_limit", "1"]
    pushing = ["--push_to_hub", "true", "--hub_model_id", REPO]
    runs = {name: tmp_path / name for name in ("silent", "pushed", "dead", "hanging")}
    output = launch_several(
        [
            [*flags, "--output_dir", str(runs["silent"])],
            [*flags, "--output_dir", str(runs["pushed"]), *pushing],
            [*flags, "--output_dir", str(runs["dead"]), *pushing],
            [*flags, "--output_dir", str(runs["hanging"]), *pushing, "--hub_wait_seconds", "5"],
        ],
        tmp_path / "plan.json",
        env={
            **{"HF_ENDPOINT": server.url, "HF_TOKEN": WRITER, "HF_HUB_DISABLE_XET": "1"},
            **{"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "no_proxy": "127.0.0.1"},
        },
        env_of_runs=[{}, {}, {"HF_ENDPOINT": NO_HUB}, {"HF_ENDPOINT": hanging.url}],
    )

    # The hub has the model of a save and then the last one, which loads as it lies in final/.
    messages = [message for _, message, _ in server.repositories[REPO].branches["main"]]
    assert messages[1] == "Weights of step 2" and messages[-1] == "Weights of final"
    assert server.repositories[REPO].private
    again = tmp_path / "again"
    again.mkdir()
    for name, content in server.repositories[REPO].files().items():
        (again / name).write_bytes(content)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        here, there = (
            AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
            for folder in (runs["pushed"] / "final", again)
        )
    assert torch.equal(here, there)
    assert output.count(f"to {server.url}/{REPO}/commit/") == len(messages) - 1

    # Nothing else differs: losses, files, and what the terminal says but for one line.
    losses = [series(run, "train/loss") for run in runs.values()]
    assert len(losses[0]) == 4 and losses == [losses[0]] * 4
    said = [line for line in output.splitlines() if "--push_to_hub: " in line]
    assert len(said) == 2, output
    assert f"{NO_HUB} cannot be reached (ConnectError: " in said[0]
    assert f"the push to {REPO} did not end in time" in said[1] and hanging.count("create")
    for line, name in zip(said, ("dead", "hanging"), strict=True):
        assert line.endswith(f"python -m mini_llm.hub push {runs[name]} --repo_id {REPO}")
    for run in list(runs.values())[1:]:
        assert sorted(os.listdir(run)) == sorted(os.listdir(runs["silent"]))
        assert sorted(os.listdir(run / "checkpoints")) == ["step-4"]

    # The token is in nothing that was written, said or sent.
    written = [path for run in runs.values() for path in run.rglob("*") if path.is_file()]
    assert not [path for path in written if WRITER.encode() in path.read_bytes()]
    assert WRITER not in output and WRITER.encode() not in server.bodies()


def test_a_push_that_cannot_be_made_is_refused_before_the_run_starts(stopped, monkeypatch) -> None:
    assert "--hub_model_id is empty; give owner/name" in stopped("--push_to_hub", "true")
    named = ["--push_to_hub", "true", "--hub_model_id", REPO]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set" in stopped(*named)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    assert "there is no token for the hub; run `hf auth login`" in stopped(*named)
