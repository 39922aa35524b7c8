"""recipes/pretrain.py on text that was not prepared, and on a prepared folder behind a URL."""

import functools
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import TinyData, write_text_shard
from tests.launching import TINY_RUN, facts, launch, metrics, series

EMPTY_ROWS = 300  # of 1,300 in each of the two raw files


@pytest.fixture(scope="module")
def mix(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for a raw source of two files, a quarter of their rows empty, and a packed one."""
    folder = tmp_path_factory.mktemp("raw")
    for seed in (1, 2):
        file = folder / f"{seed}.parquet"
        write_text_shard(file, documents=1000, seed=seed)
        good = pq.read_table(file)
        empty = good.slice(0, EMPTY_ROWS).set_column(0, "text", pa.array([""] * EMPTY_ROWS))
        pq.write_table(pa.concat_tables([good.slice(0, 500), empty, good.slice(500)]), file)
    data = {
        "raw": {"path": str(folder), "weight": 2},
        "packed": {"path": str(tiny_data.packed), "weight": 1},
    }
    return [*TINY_RUN, *tiny_data.flags, "--data", json.dumps(data), "--eval_steps", "5"]


@pytest.fixture(scope="module")
def interrupted(mix: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five of ten steps on two ranks."""
    run = tmp_path_factory.mktemp("interrupted") / "run"
    half = launch(*mix, "--output_dir", str(run), "--max_steps", "10", "--stop_at_step", "5")
    assert "stopping at step 5; the same command without --stop_at_step goes on" in half.stdout
    return run


def test_raw_text_needs_as_many_ranks_as_before_and_one_sentence_says_so(interrupted, mix, stopped):
    text = stopped(*mix, "--output_dir", str(interrupted), "--max_steps", "10")
    assert "of 2 ranks, this run has 1" in text and "raw text (raw)" in text


def test_ten_steps_on_raw_text_equal_five_and_five_and_count_every_token_and_rejected_row(
    interrupted, mix, tmp_path
):
    state = json.loads((interrupted / "checkpoints/step-5/state.json").read_text())
    assert [part["rank"] for part in state["stream"]] == [0, 1]
    flags = [*mix, "--max_steps", "10"]
    done = launch(*flags, "--output_dir", str(interrupted))
    assert "resumed at step 5" in done.stdout
    launch(*flags, "--output_dir", str(tmp_path / "whole"))

    deterministic = [
        {key: value for key, value in step.items() if not key.startswith("perf/")}
        for step in metrics(tmp_path / "whole")
    ]
    assert deterministic == [
        {key: value for key, value in step.items() if not key.startswith("perf/")}
        for step in metrics(interrupted)
    ]
    last = deterministic[-1]
    assert last["step"] == 10 and last["train/loss"] < deterministic[0]["train/loss"]
    assert last["train/tokens"] == last["data/raw/tokens"] + last["data/packed/tokens"]
    assert last["data/raw/tokens"] > last["data/packed/tokens"] > 0
    assert {"eval/raw/loss", "eval/packed/loss"} <= last.keys()
    rejected = last["data/raw/rejected"]
    assert 0 < rejected <= 2 * EMPTY_ROWS and "data/packed/rejected" not in last
    assert f"raw: {rejected} rows or lines were nothing to train on" in done.stdout
    assert f"({rejected} empty)" in done.stdout
    assert facts(interrupted)["data_fingerprint"] == facts(tmp_path / "whole")["data_fingerprint"]


def test_all_held_out_rows_of_raw_text_are_refused_before_the_model_is_built(mix, stopped):
    text = stopped(*mix, "--max_eval_rows", "0")
    assert "--max_eval_rows: the raw data 'raw' needs a limit" in text


@pytest.fixture
def served(tiny_data: TinyData) -> Iterator[tuple[str, Counter[str]]]:
    """The URL of the packed folder on a loopback server, and the requests it got."""
    requests: Counter[str] = Counter()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            requests[self.path] += 1

    handler = functools.partial(Handler, directory=str(tiny_data.packed))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_prepared_folder_behind_a_url_gives_the_losses_of_the_local_one(
    served, tiny_data, tmp_path
):
    url, requests = served
    flags = [*TINY_RUN, *tiny_data.flags, "--max_steps", "3", "--eval_steps", "3"]
    flags += ["--deepspeed", "none"]
    remote = ["--data", json.dumps({"tiny": {"path": url, "weight": 1}})]
    plain = {"config": "single", "processes": 1}
    launch(*flags, "--output_dir", str(tmp_path / "local"), **plain)
    cache = {"MINI_LLM_CACHE": str(tmp_path / "cache"), "no_proxy": "127.0.0.1"}
    launch(*flags, *remote, "--output_dir", str(tmp_path / "remote"), **plain, env=cache)
    for key in ("train/loss", "eval/tiny/loss", "eval/tiny/bits_per_byte"):
        assert series(tmp_path / "remote", key) == series(tmp_path / "local", key) != []
    assert facts(tmp_path / "remote")["identity"] == facts(tmp_path / "local")["identity"]
    assert requests["/validation/000000.parquet"] == 1
