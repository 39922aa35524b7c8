"""prepare_sft.py: sampling, packing, resuming, bad input, the endpoint, and reading the rows."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_tools import prepare_sft, self_awareness, sft_charts, sft_sampling
from data_tools.self_awareness import SelfAwareness
from mini_llm.data.packed_stream import Row, open_prepared
from mini_llm.data.sft_files import (
    SftManifest,
    load_sft_manifest,
    pack_conversations,
)
from mini_llm.data.tokenizer import load_tokenizer, train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
SEQ_LEN = 192
WORDS = ["row", "packing", "训练", "模型", "数据", "x = 1", "don't", "3.14", "end.", "<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    described = SelfAwareness.of(flags([folder], folder, folder)).questions
    texts = [question.question + question.answer for question in described]
    train_tokenizer([*texts, " ".join(WORDS * 20)], 600).save_pretrained(str(folder))
    return folder


def records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """DeepCtrl records: type 0 three times as often as type 1, a third with several turns."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        history = [[f"{i} {t} past?", draw.choice(WORDS)] for t in range((i % 3 == 0) * 2)]
        answer = draw.choice([" ", "\n", ""]) + " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))
        record = {"id": i, "instruction": f"Question {i}", "input": draw.choice(["", "data"])}
        record |= {"output": answer, "history": history, "type": int(i % 4 == 0)}
        found.append(record)
    return found


def write_jsonl(path: Path, found: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        item if isinstance(item, bytes) else json.dumps(item, ensure_ascii=False).encode() + b"\n"
        for item in found
    ]
    path.write_bytes(b"".join(lines))
    return path


def flags(inputs: Sequence[Path], tokenizer: Path, output: Path, **options: Any) -> Any:
    values = {"seq_len": SEQ_LEN, "single_turn": 60, "multi_turn": 30, "self_awareness": 10}
    values |= {"validation_fraction": 0.1, "num_proc": 1, **options}
    command = ["--input", *inputs, "--tokenizer", tokenizer, "--output_dir", output]
    for name, value in values.items():
        command += [f"--{name}", value]
    return prepare_sft.parse_arguments([str(part) for part in command])


def prepare(inputs: Sequence[Path], tokenizer: Path, output: Path, **options: Any) -> SftManifest:
    return prepare_sft.prepare(flags(inputs, tokenizer, output, **options))


def fingerprints(folder: Path, without: Sequence[str] = ("stages",)) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in without
    }


def rows_of(folder: Path, split: str) -> Iterator[Row]:
    reader = open_prepared(folder, of_conversations=True).reader(split)
    return (reader.row_at(number, "") for number in range(reader.rows))


def conversations_of(folder: Path, tokenizer: Path) -> Counter[str]:
    """Decode every conversation of every row, by its length in doc_lens."""
    decoder = load_tokenizer(tokenizer)
    found: Counter[str] = Counter()
    for split in ("train", "validation"):
        for row in rows_of(folder, split):
            start = 0
            for length in row["doc_lens"].tolist():
                found[decoder.decode(row["input_ids"][start : start + length].tolist())] += 1
                start += length
    return found


def rendered(record: dict[str, Any]) -> str:
    """Independent of the code under test: ChatML, written out by hand."""
    question = "\n".join(text for text in (record["instruction"], record["input"]) if text)
    turns = [*record["history"], [question, record["output"]]]
    return "".join(
        f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n" for q, a in turns
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("source") / "deepctrl.jsonl", records(300))


@pytest.fixture(scope="module")
def prepared(
    source: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, SftManifest]:
    folder = tmp_path_factory.mktemp("prepared") / "sft"
    return folder, prepare([source], tokenizer_dir, folder)


def test_quotas_are_taken_and_every_line_is_accounted_for(
    prepared: tuple[Path, SftManifest],
) -> None:
    _, manifest = prepared
    kinds: Counter[str] = Counter()
    for split in manifest.splits.values():
        kinds.update(split.conversations_per_kind)
    assert kinds == {"single_turn": 60, "multi_turn": 30, "self_awareness": 10}
    assert (
        manifest.input_lines == 300 == 90 + manifest.not_sampled + sum(manifest.rejected.values())
    )
    # 200 single-turn: those of i % 3 != 0, of which i % 4 == 0 are 50, so a quarter of the quota.
    assert manifest.sampling["single_turn"]["types"] == {
        "0": {"available": 150, "taken": 45},
        "1": {"available": 50, "taken": 15},
    }


def test_rows_hold_the_conversations_of_the_input_whole_and_once(
    prepared: tuple[Path, SftManifest], tokenizer_dir: Path
) -> None:
    folder, manifest = prepared
    found = conversations_of(folder, tokenizer_dir)
    expected = {rendered(record) for record in records(300)}
    of_input = {text for text in found if text in expected}
    assert len(of_input) == 90 and set(found.values()) == {1}
    about_itself = set(found) - of_input
    assert len(about_itself) == 10 and all("<|im_start|>user\n" in t for t in about_itself)
    assert manifest.splits["train"].utilisation > 0.9


def test_supervised_spans_of_the_rows_are_the_answers_and_their_ends(
    prepared: tuple[Path, SftManifest], tokenizer_dir: Path
) -> None:
    folder, manifest = prepared
    decoder = load_tokenizer(tokenizer_dir)
    answers = {r["output"] for r in records(300)} | {
        a for r in records(300) for _, a in r["history"]
    }
    answers |= {q.answer for q in SelfAwareness.of(flags([folder], folder, folder)).questions}
    supervised = 0
    for split in ("train", "validation"):
        for row in rows_of(folder, split):
            mask = row["loss_mask"]
            assert mask.any() and not mask[row["doc_lens"].sum() :].any()
            edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
            for start, stop in zip(edges[::2], edges[1::2], strict=True):
                text = decoder.decode(row["input_ids"][start:stop].tolist())
                assert text.endswith("<|im_end|>") and text.removesuffix("<|im_end|>") in answers
            supervised += int(mask.sum())
    assert supervised == sum(split.supervised_tokens for split in manifest.splits.values())


def test_files_are_those_that_the_manifest_names(prepared: tuple[Path, SftManifest]) -> None:
    folder, manifest = prepared
    assert load_sft_manifest(folder) == manifest
    for split in manifest.splits.values():
        for entry in split.files:
            content = (folder / entry.file).read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry.sha256
            table = pq.read_table(folder / entry.file)
            assert table.schema.field("input_ids").type == pa.list_(pa.uint16(), SEQ_LEN)
            assert table.schema.field("loss_mask").type == pa.list_(pa.bool_(), SEQ_LEN)
            assert entry.tokens == sum(map(sum, table["doc_lens"].to_pylist()))


def test_charts_are_pictures(prepared: tuple[Path, SftManifest]) -> None:
    for name in ("lengths", "utilisation", "attention_mask"):
        content = (prepared[0] / "plots" / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000


def test_attention_mask_keeps_conversations_apart() -> None:
    mask = sft_charts.attention_mask(np.array([2, 1]), 4)
    assert mask.astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


@pytest.mark.slow
def test_same_bytes_again_with_more_processes_and_other_parts_of_work(
    prepared: tuple[Path, SftManifest],
    source: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
) -> None:
    """Through the command line: 2 processes over 3 files with the lines of the one."""
    prepare([source], tokenizer_dir, tmp_path / "again")
    assert fingerprints(tmp_path / "again") == fingerprints(prepared[0])
    parts = [
        write_jsonl(tmp_path / "parts" / f"{i}.jsonl", records(300)[i * 100 : i * 100 + 100])
        for i in range(3)
    ]
    for num_proc in (1, 2):
        options = flags(parts, tokenizer_dir, tmp_path / f"p{num_proc}", num_proc=num_proc)
        command = [sys.executable, "data_tools/prepare_sft.py"]
        for name, value in vars(options).items():
            if value is not None:
                command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    assert fingerprints(tmp_path / "p1") == fingerprints(tmp_path / "p2")
    # Only the manifest names the files of the input.
    rows = [
        {k: v for k, v in fingerprints(folder).items() if k != "manifest.json"}
        for folder in (tmp_path / "p1", prepared[0])
    ]
    assert rows[0] == rows[1]


def test_smaller_slices_and_scans_choose_the_same_conversations(
    prepared: tuple[Path, SftManifest],
    source: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sft_sampling, "SAMPLED_AT_ONCE", 7)
    monkeypatch.setattr(prepare_sft, "SCAN_BYTES", 999)
    prepare([source], tokenizer_dir, tmp_path / "small")
    assert fingerprints(tmp_path / "small") == fingerprints(prepared[0])
    monkeypatch.setattr(prepare_sft, "WINDOW_CONVERSATIONS", 20)  # other rows, the same content
    prepare([source], tokenizer_dir, tmp_path / "windows", rows_per_file=4)
    both = [conversations_of(f, tokenizer_dir) for f in (tmp_path / "windows", prepared[0])]
    assert both[0] == both[1]
    assert len(load_sft_manifest(tmp_path / "windows").splits["train"].files) > 1


STAGES = ["run_jobs:scan", "sample", "make_self_awareness", "run_jobs:pack", "write_sft_manifest"]


@pytest.mark.parametrize("killed_at", STAGES)
def test_restart_after_a_kill_goes_on_after_the_last_finished_stage(
    prepared: tuple[Path, SftManifest],
    source: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    killed_at: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL at the beginning of each stage; the stages before it are not done again."""
    name, _, argument = killed_at.partition(":")
    options = flags([source], tokenizer_dir, tmp_path / "out")
    command = []
    for flag, value in vars(options).items():
        if value is not None:
            command += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    script = textwrap.dedent(f"""
        import os, signal, sys
        from data_tools import prepare_sft as tool
        original = tool.{name}
        def killed(*args, **kwargs):
            if {argument!r} in ("", args[0]):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        tool.{name} = killed
        tool.prepare(tool.parse_arguments(sys.argv[1:]))
    """)
    run = subprocess.run([sys.executable, "-c", script, *command], cwd=REPOSITORY, check=False)
    assert run.returncode == -9
    assert not (tmp_path / "out" / "manifest.json").exists()

    done: list[str] = []
    worker, sample, ask = (
        prepare_sft.Worker.__call__,
        prepare_sft.sample,
        prepare_sft.make_self_awareness,
    )

    def seen(stage: str, original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            job = args[1] if stage == "job" else None
            done.append(stage if job is None else f"run_jobs:{job.name.split('-')[0]}")
            return original(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(prepare_sft.Worker, "__call__", seen("job", worker))
    monkeypatch.setattr(prepare_sft, "sample", seen("sample", sample))
    monkeypatch.setattr(prepare_sft, "make_self_awareness", seen("make_self_awareness", ask))
    prepare_sft.prepare(options)
    assert sorted(set(done), key=STAGES.index) == STAGES[STAGES.index(killed_at) : 4]
    assert fingerprints(tmp_path / "out") == fingerprints(prepared[0])


def test_bad_lines_are_counted_by_reason_and_kept(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = records(20)
    tool_call = {"messages": [{"role": "tool", "content": "x"}]}
    lines: list[Any] = [
        *good, good[0], b"{broken}\n", b'{"output": "\xff"}\n', b"\n", tool_call,
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]},
        {"instruction": "a", "input": "", "output": " "},
        {"instruction": "a" * 5000, "input": "", "output": "b"},
        {"q": "one?", "a": "two"}, b'{"instruction": "cut o',
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "in" / "bad.jsonl", lines)
    manifest = prepare([path], tokenizer_dir, tmp_path / "out", validation_fraction=0)
    assert manifest.rejected == {
        "duplicate": 1, "empty_assistant_turn": 1, "empty_line": 1, "invalid_json": 1,
        "no_assistant_turn": 1, "not_utf8": 1, "role_tool": 1, "roles_out_of_order": 1,
        "too_long": 1, "truncated_line": 1,
    }  # fmt: skip
    assert manifest.mended["question_answer_keys"] == 1
    assert manifest.input_lines == 31 == 21 + 10 and manifest.not_sampled == 0
    kept = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open("rb")]
    assert Counter(line["reason"] for line in kept) == {
        reason: 1 for reason in manifest.rejected if reason not in ("duplicate", "too_long")
    }
    text = capsys.readouterr().out
    assert "--single_turn 60: only 14 are there" in text
    assert "31 lines = 21 taken + 0 not sampled + 10 rejected" in text


def test_too_long_conversations_are_cut_at_a_turn_or_dropped(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    long = records(1)[0] | {"history": [[f"ask {i}", "word " * 20] for i in range(6)]}
    hopeless = {"instruction": "a" * 5000, "input": "", "output": "b", "history": []}
    path = write_jsonl(tmp_path / "in.jsonl", [long, hopeless, *records(9)[1:]])
    options = {"validation_fraction": 0, "self_awareness": 0}
    manifest = prepare([path], tokenizer_dir, tmp_path / "drop", **options)
    assert manifest.rejected == {"too_long": 2}
    manifest = prepare([path], tokenizer_dir, tmp_path / "cut", too_long="truncate", **options)
    assert manifest.rejected == {"too_long": 1} and manifest.mended["truncated"] == 1
    (cut,) = [t for t in conversations_of(tmp_path / "cut", tokenizer_dir) if "ask 0" in t]
    assert rendered(long).startswith(cut) and cut.endswith("<|im_end|>\n") and cut.count("ask") > 1


def test_all_too_long_is_an_error_with_the_reason(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"q": "a" * 5000, "a": "b"}] * 3)
    with pytest.raises(ValueError, match=r"--input: no conversation is left .*3 too_long"):
        prepare([path], tokenizer_dir, tmp_path / "out", self_awareness=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 999}, "--max_tokens 999 must lie between"),
        ({"max_tokens": 0}, "--max_tokens 0 must lie between"),
        ({"seq_len": 2}, "--seq_len must be at least 4"),
        ({"single_turn": -1}, "--single_turn must not be negative"),
        ({"validation_fraction": 1}, "--validation_fraction must lie in"),
        ({"endpoint": "http://localhost"}, "--endpoint and --endpoint_model belong together"),
        ({"self_awareness_file": "/gone.yaml"}, "--self_awareness_file: /gone.yaml does not exist"),
    ],
)
def test_flag_out_of_range_is_named(
    source: Path, tokenizer_dir: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        prepare([source], tokenizer_dir, tmp_path / "out", **options)


def test_finished_folder_is_reused_and_other_options_are_refused_by_name(
    prepared: tuple[Path, SftManifest], source: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    before = fingerprints(prepared[0])
    assert prepare([source], tokenizer_dir, prepared[0]) == prepared[1]
    with pytest.raises(ValueError, match="--output_dir: .* another --multi_turn, --seed;"):
        prepare([source], tokenizer_dir, prepared[0], seed=1, multi_turn=9)
    assert fingerprints(prepared[0]) == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"--output_dir: .*holds other files \(thesis.txt\)"):
        prepare([source], tokenizer_dir, tmp_path)


def test_output_folder_in_the_input_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Its quarantine.jsonl would be read with the input by the next run."""
    write_jsonl(tmp_path / "in/a.jsonl", [*records(60), b"{broken\n"])
    with pytest.raises(ValueError, match="--output_dir: .* would become its own input"):
        prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "in/packed")
    assert not (tmp_path / "in/packed").exists()


def test_shares_are_proportional_and_sum_to_the_quota() -> None:
    assert sft_sampling.largest_remainder([5, 3, 2], 5) == [3, 1, 1]
    assert sft_sampling.largest_remainder([1, 1], 5) == [1, 1]
    assert sft_sampling.largest_remainder([], 5) == []
    draw = random.Random(0)
    for _ in range(300):
        available = [draw.randint(0, 50) for _ in range(draw.randint(1, 9))]
        quota = draw.randint(0, 200)
        shares = sft_sampling.largest_remainder(available, quota)
        total = sum(available)
        assert sum(shares) == min(quota, total)
        for share, count in zip(shares, available, strict=True):
            assert share <= count
            assert abs(share - count * min(quota, total) / max(total, 1)) < 1


# Self-awareness


def test_project_file_makes_200_different_conversations_in_two_languages() -> None:
    described = SelfAwareness.of(flags([Path()], Path(), Path(), self_awareness=200))
    pairs = {(question.question, question.answer) for question in described.questions}
    assert len(pairs) == len(described.questions) >= 200
    assert not any("{" in text for pair in pairs for text in pair)


def test_broken_self_awareness_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "me.yaml"
    for content, why in (
        ("a: [", "is not YAML"),
        ("facts: {}", "'topics'"),
        (
            "facts: {en: {}}\nendpoint_system: {en: x}\n"
            "topics: [{language: en, questions: [q], answers: ['{name}']}]",
            "'name'",
        ),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"--self_awareness_file: .*me.yaml .*{why}"):
            SelfAwareness.of(flags([path], path, path, self_awareness_file=path))


def test_line_separators_in_what_the_model_says_of_itself_are_text(
    source: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    described: dict[str, Any] = {"facts": {"en": {}}, "endpoint_system": {"en": "Answer."}}
    answer = "a model\u2028small\u2029and\x85new"
    described["topics"] = [{"language": "en", "questions": ["Who?"], "answers": [answer]}]
    path = tmp_path / "me.yaml"
    path.write_text(yaml.safe_dump(described))
    prepare([source], tokenizer_dir, tmp_path / "out", self_awareness_file=path)
    said = conversations_of(tmp_path / "out", tokenizer_dir)
    assert [text for text in said if f"assistant\n{answer}<|im_end|>" in text]


class Endpoint(ThreadingHTTPServer):
    """A loopback server that speaks as much of the OpenAI API as is needed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), EndpointHandler)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self.failures = 0
        self.cut_answers = 0
        self.stop_after = 10**9
        self.text = "I am {name}, says the server"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class EndpointHandler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.headers.append(self.headers["Authorization"])
        if self.server.failures > 0 or len(self.server.requests) >= self.server.stop_after:
            self.server.failures -= 1
            self.send_error(503 if self.server.stop_after > 10**6 else 401)
            return
        self.server.requests.append({"path": self.path, **body})
        text = self.server.text.format(name="Mini-LLM") + f" {body['seed']}"
        content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        cut = 9 if self.server.cut_answers > 0 else 0
        self.server.cut_answers -= 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + cut))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(self_awareness.time, "sleep", lambda seconds: None)
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def only_names(tmp_path: Path) -> Path:
    """Four questions, all about the name."""
    described = yaml.safe_load(
        Path(prepare_sft.__file__).with_name("self_awareness.yaml").read_text()
    )
    topic = next(t for t in described["topics"] if t["topic"] == "name" and t["language"] == "en")
    topic["answers"] = topic["answers"][:1]
    topic["questions"] = topic["questions"][:4]
    described["topics"] = [topic]
    path = tmp_path / "names.yaml"
    path.write_text(yaml.safe_dump(described))
    return path


def test_endpoint_answers_become_conversations_and_are_not_asked_twice(
    endpoint: Endpoint,
    only_names: Path,
    source: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    options = {
        "endpoint": endpoint.url,
        "endpoint_model": "teacher",
        "endpoint_key_variable": "MY_KEY",
        "self_awareness_file": only_names,
    }
    endpoint.stop_after = 2
    with pytest.raises(ValueError, match="--endpoint: .*401.*MY_KEY"):
        prepare([source], tokenizer_dir, tmp_path / "out", **options)
    endpoint.stop_after = 10**9
    endpoint.failures = 2  # which are tried again
    manifest = prepare([source], tokenizer_dir, tmp_path / "out", **options)
    assert len(endpoint.requests) == 4 and len({r["seed"] for r in endpoint.requests}) == 4
    assert {r["path"] for r in endpoint.requests} == {"/v1/chat/completions"}
    assert {r["model"] for r in endpoint.requests} == {"teacher"}
    assert all("Mini-LLM" in r["messages"][0]["content"] for r in endpoint.requests)
    assert set(endpoint.headers) == {"Bearer s3cret"}
    assert manifest.sampling["self_awareness"] == {
        "asked_for": 10, "available": 4, "taken": 4, "rejected": {}, "answers_of": "teacher",
    }  # fmt: skip
    told = [t for t in conversations_of(tmp_path / "out", tokenizer_dir) if "says the server" in t]
    assert len(told) == 4
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"s3cret" not in path.read_bytes()


def test_endpoint_answer_that_lacks_the_name_is_not_used(
    endpoint: Endpoint, only_names: Path, source: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    endpoint.text = "I am some other model"
    options = {"endpoint": endpoint.url, "endpoint_model": "m", "self_awareness_file": only_names}
    manifest = prepare([source], tokenizer_dir, tmp_path / "out", **options)
    assert manifest.sampling["self_awareness"]["rejected"] == {"lacks_a_fact": 4}
    assert manifest.sampling["self_awareness"]["taken"] == 0


def test_unreachable_endpoint_is_named(
    endpoint: Endpoint, source: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    url = endpoint.url
    endpoint.failures = 10**9
    with pytest.raises(ValueError, match="--endpoint: .* answered 503"):
        prepare([source], tokenizer_dir, tmp_path / "out", endpoint=url, endpoint_model="m")


def test_endpoint_answer_that_breaks_off_is_asked_for_again_and_then_named(
    endpoint: Endpoint, only_names: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    options = {"endpoint": endpoint.url, "endpoint_model": "m", "self_awareness_file": only_names}
    asked = flags([tmp_path], tokenizer_dir, tmp_path, **options)
    endpoint.cut_answers = 2
    assert "says the server 0" in self_awareness.request_answer(asked, {"seed": 0})
    assert len(endpoint.requests) == 3
    endpoint.cut_answers = 10**9
    with pytest.raises(OSError, match="--endpoint: .* cannot be reached .*9 more expected"):
        self_awareness.request_answer(asked, {"seed": 0})


# Packing and reading


def test_packing_refuses_what_cannot_stand_in_a_row() -> None:
    ids, answers = np.arange(10, 16, dtype=np.uint16), np.array([0, 1, 1, 0, 0, 1], bool)
    packed = pack_conversations(ids, answers, np.array([3, 3]), 8)
    assert packed.input_ids.tolist() == [[10, 11, 12, 13, 14, 15, 0, 0]]
    assert packed.loss_mask[0].tolist() == [*answers.tolist(), False, False]
    with pytest.raises(ValueError, match="6 tokens and a row 5"):
        pack_conversations(ids, answers, np.array([6]), 5)
    with pytest.raises(ValueError, match="no supervised token"):
        pack_conversations(ids, np.array([0, 1, 1, 1, 0, 0], bool), np.array([3, 3]), 8)
