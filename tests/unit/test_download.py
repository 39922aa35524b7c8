"""Downloads: resumed, verified, complete or absent; against a loopback hub that fails."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import download
from mini_llm.data import remote_files
from mini_llm.data.remote_files import RemoteDataset, RemoteFile, target_path
from tests.unit.hub_server import CUT, NO_RANGE, RESET, SLOW, WRONG, HubServer
from tests.unit.prepare_fixtures import REPOSITORY, files_of

SHARD = "4_5/000000.parquet"
SOURCES = ("hub", "modelscope")


def shards(count: int) -> dict[str, bytes]:
    """Files of a few kB, some outside the folder that is asked for."""
    draw = random.Random(0)
    files = {
        f"4_5/{i:06d}.parquet": draw.randbytes(1000 + draw.randrange(9000)) for i in range(count)
    }
    return files | {"3_4/000000.parquet": b"scores too low", "README.md": b"# read me"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for variable in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(remote_files, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(remote_files, "CHUNK_BYTES", 100)
    server = HubServer(shards(5))
    yield server
    server.close()


def run(server: HubServer, folder: Path, *flags: object, source: str = "hub") -> None:
    """Download FineWeb from the server in this process."""
    words = ["--dataset", "fineweb", "--source", source, "--endpoint", server.url]
    words += ["--output_dir", str(folder), *map(str, flags)]
    download.download(download.parse_arguments(words))


def wanted(server: HubServer) -> dict[str, bytes]:
    return {path: content for path, content in server.files.items() if path.startswith("4_5/")}


def got(folder: Path) -> dict[str, bytes]:
    return {path: content for path, content in files_of(folder).items() if path[0] != "."}


def one_file(server: HubServer, source: str = "hub") -> tuple[RemoteDataset, RemoteFile]:
    remote = RemoteDataset(source, "opencsg/texts", server.url)
    return remote, next(file for file in remote.list_files() if file.path == SHARD)


# What is there


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("page_files", [2, 5, 1000])
def test_files_of_the_folder_come_whole_however_the_list_is_cut_into_pages(
    tmp_path: Path, server: HubServer, source: str, page_files: int
) -> None:
    server.page_files = page_files
    run(server, tmp_path, source=source)
    assert got(tmp_path) == wanted(server)


@pytest.mark.parametrize("source", SOURCES)
def test_dry_run_prints_every_file_with_its_bytes_and_downloads_nothing(
    tmp_path: Path, server: HubServer, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    run(server, tmp_path / "out", "--dry_run", source=source)
    printed = capsys.readouterr().out
    for path, content in wanted(server).items():
        assert f"{len(content):,}  {path}\n" in printed
    total = sum(map(len, wanted(server).values()))
    assert f"{total:,}  bytes in 5 files" in printed
    assert not (tmp_path / "out").exists()
    assert not any(server.downloads(path) for path in server.files)


def test_subset_of_files_depends_on_seed_alone_and_a_larger_one_contains_it() -> None:
    files = [RemoteFile(f"4_5/{i:06d}.parquet", 1, None, "") for i in range(1000)]
    remote = RemoteDataset("hub", "a/b", "http://127.0.0.1")

    def chosen(count: int, seed: int, listed: list[RemoteFile] = files) -> set[str]:
        found = download.choose_files(listed, ("*.parquet",), count, seed, remote)
        assert [f.path for f in found] == sorted(f.path for f in found)
        return {file.path for file in found}

    assert len(chosen(100, 0)) == 100
    assert chosen(100, 0) == chosen(100, 0, files[::-1])
    assert chosen(100, 0) < chosen(101, 0) < chosen(500, 0)
    assert len(chosen(100, 0) & chosen(100, 1)) < 40  # 10 expected
    with pytest.raises(ValueError, match="--files 1001 is more than the 1000 there are"):
        chosen(1001, 0)


def test_subset_is_downloaded_and_added_to(tmp_path: Path, server: HubServer) -> None:
    run(server, tmp_path, "--files", 2)
    few = got(tmp_path)
    assert len(few) == 2
    run(server, tmp_path, "--files", 4)
    assert len(got(tmp_path)) == 4 and few.items() <= got(tmp_path).items()
    assert all(server.downloads(path) == 1 for path in got(tmp_path))


def test_every_dataset_of_the_menu_takes_its_own_files_of_its_repository(
    tmp_path: Path, server: HubServer
) -> None:
    ready_made = [
        *("fineweb_edu_sampled_5_percent.zip", "fineweb_edu_sampled_20_percent.zip"),
        *("fineweb_edu_sampled_20_percent.bin", "fineweb_edu_sampled_0.1_percent.bin"),
        *("fineweb_edu.bin", "deepctrl.bin", "train.bin", "sft_parquet.zip", "dpo_data.zip"),
        *("sft_data_zh.jsonl", "sft_data_en.jsonl", "README.md"),
    ]
    server.files |= dict.fromkeys(ready_made, b"x")
    taken = {}
    for name, dataset in download.DATASETS.items():
        source = next(iter(dataset.repos))
        remote = download.open_remote(name, None, server.url)
        assert remote.source == source
        found = remote.list_files(dataset.folder)
        chosen = download.choose_files(found, dataset.patterns, None, 0, remote)
        taken[name] = [file.path for file in chosen]
    assert taken.pop("fineweb") == sorted(wanted(server))
    assert taken == {
        "fineweb-5-percent": ["fineweb_edu_sampled_5_percent.zip"],
        "fineweb-20-percent": ["fineweb_edu_sampled_20_percent.zip"],
        "tokens-20-percent": ["fineweb_edu_sampled_20_percent.bin"],
        "tokens-fineweb": ["fineweb_edu.bin"],
        "tokens-deepctrl": ["deepctrl.bin"],
        "deepctrl-zh": ["sft_data_zh.jsonl"],
        "deepctrl-en": ["sft_data_en.jsonl"],
        "sft-parquet": ["sft_parquet.zip"],
    }


def test_pattern_that_matches_nothing_names_what_there_is(
    tmp_path: Path, server: HubServer
) -> None:
    with pytest.raises(ValueError, match=r"--include: .* matches \*\.csv; it has 3_4/000000"):
        run(server, tmp_path, "--include", "*.csv")
    run(server, tmp_path, "--include", "*.md")
    assert got(tmp_path) == {"README.md": b"# read me"}


def test_menu_asks_for_dataset_and_number_of_files_and_confirmation(
    tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["1", "3", "y"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    flags = ["--endpoint", server.url, "--output_dir", str(tmp_path)]
    download.download(download.parse_arguments(flags))
    assert len(got(tmp_path)) == 3
    answers = iter(["99"])
    with pytest.raises(ValueError, match="'99' is none of the numbers 1 to 9"):
        download.download(download.parse_arguments(flags))
    answers = iter(["fineweb", "", "n"])
    download.download(download.parse_arguments([*flags[:2], "--output_dir", str(tmp_path / "no")]))
    assert not (tmp_path / "no").exists()


def test_end_says_which_command_comes_next(
    tmp_path: Path, server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run(server, tmp_path, "--files", 1)
    printed = capsys.readouterr().out
    assert f"next: python data_tools/prepare_pretrain.py --input {tmp_path} " in printed
    run(server, tmp_path, "--files", 1, "--seed", 3)
    assert "also holds 1 files of other downloads" in capsys.readouterr().out


def test_next_command_holds_for_a_folder_with_a_space_and_names_its_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a shell takes it apart."""
    commands = []
    for content in (download.TEXT, download.PACKED_CONVERSATIONS):
        download.show_next_step(content, Path("my data/it's"), set())
        commands.append(shlex.split(capsys.readouterr().out.removeprefix("next: ")))
    prepare, sft = commands
    assert prepare[2:6] == ["--input", "my data/it's", "--output_dir", "my data/it's_packed"]
    assert json.loads(sft[sft.index("--data") + 1])["sft"]["path"] == "my data/it's"
    assert (REPOSITORY / sft[sft.index("--config") + 1]).is_file()


# Resumed and verified


@pytest.mark.parametrize("source", SOURCES)
def test_interrupted_file_goes_on_at_its_last_byte(
    tmp_path: Path, server: HubServer, source: str
) -> None:
    content = server.files[SHARD]
    (tmp_path / "4_5").mkdir()
    (tmp_path / f"{SHARD}.part").write_bytes(content[:777])
    run(server, tmp_path, source=source)
    assert got(tmp_path) == wanted(server)
    assert server.ranges() == ["bytes=777-"]


@settings(max_examples=25, deadline=None)
@given(
    faults=st.lists(st.sampled_from([CUT, RESET, NO_RANGE, 500, 503, 429]), max_size=5),
    kept=st.integers(0, 5000),
)
def test_any_sequence_of_passing_faults_ends_with_the_exact_bytes(
    tmp_path_factory: pytest.TempPathFactory, faults: list[int | str], kept: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    content = random.Random(1).randbytes(5000)
    server = HubServer({SHARD: content})
    server.faults[SHARD] = list(faults)
    counted: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setattr(remote_files, "FIRST_WAIT_SECONDS", 0.0001)
        remote, file = one_file(server)
        (folder / "x.part").write_bytes(content[:kept])
        remote.fetch(file, folder / "x", counted.append)
    server.close()
    assert files_of(folder) == {"x": content}
    assert sum(counted) == len(content)  # what the progress bar shows at the end


def test_part_of_another_version_of_the_file_is_found_out_and_fetched_anew(
    tmp_path: Path, server: HubServer
) -> None:
    (tmp_path / "4_5").mkdir()
    (tmp_path / f"{SHARD}.part").write_bytes(b"?" * 500)
    run(server, tmp_path)
    assert got(tmp_path) == wanted(server)
    assert server.downloads(SHARD) == 2


def test_part_is_not_trusted_where_no_sum_is_published(tmp_path: Path, server: HubServer) -> None:
    server.sha256[SHARD] = None
    (tmp_path / "4_5").mkdir()
    (tmp_path / f"{SHARD}.part").write_bytes(b"?" * 500)
    run(server, tmp_path)
    assert got(tmp_path) == wanted(server)
    assert server.ranges() == []


def test_part_that_is_too_long_or_complete_needs_no_special_care(
    tmp_path: Path, server: HubServer
) -> None:
    remote, file = one_file(server)
    (tmp_path / "long.part").write_bytes(server.files[SHARD] + b"?")
    remote.fetch(file, tmp_path / "long", lambda size: None)
    (tmp_path / "whole.part").write_bytes(server.files[SHARD])
    before = server.downloads(SHARD)
    remote.fetch(file, tmp_path / "whole", lambda size: None)
    assert server.downloads(SHARD) == before
    assert files_of(tmp_path) == dict.fromkeys(["long", "whole"], server.files[SHARD])


def test_empty_file_is_a_file(tmp_path: Path, server: HubServer) -> None:
    server.files[SHARD] = b""
    run(server, tmp_path)
    assert got(tmp_path)[SHARD] == b""


def test_wrong_bytes_are_fetched_once_more(tmp_path: Path, server: HubServer) -> None:
    server.faults[SHARD] = [WRONG]
    run(server, tmp_path)
    assert got(tmp_path) == wanted(server)


def test_wrong_checksum_twice_names_file_and_both_sums_and_leaves_nothing_of_it(
    tmp_path: Path, server: HubServer
) -> None:
    server.sha256[SHARD] = "0" * 64
    real = hashlib.sha256(server.files[SHARD]).hexdigest()
    with pytest.raises(ValueError, match=f"1 of 5 files .*{SHARD}: .*{real}, {'0' * 64} is publis"):
        run(server, tmp_path)
    assert server.downloads(SHARD) == 2
    assert got(tmp_path) == {p: c for p, c in wanted(server).items() if p != SHARD}


def test_another_size_than_listed_is_said_at_once(tmp_path: Path, server: HubServer) -> None:
    server.sizes[SHARD] = 123
    has = f"{len(server.files[SHARD]):,}"
    with pytest.raises(ValueError, match=f"{SHARD}: the server has {has} bytes .* says 123"):
        run(server, tmp_path)
    assert not (tmp_path / f"{SHARD}.part").exists()


def test_complete_files_are_verified_and_not_fetched_again(
    tmp_path: Path, server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run(server, tmp_path)
    damaged = bytearray(server.files[SHARD])
    damaged[5] ^= 1
    (tmp_path / SHARD).write_bytes(damaged)
    capsys.readouterr()
    run(server, tmp_path, "--no_verify")  # which looks at sizes alone
    assert (tmp_path / SHARD).read_bytes() == damaged
    run(server, tmp_path)
    assert "its sha256 is" in capsys.readouterr().out
    assert got(tmp_path) == wanted(server)
    assert server.downloads(SHARD) == 2
    assert server.downloads("4_5/000001.parquet") == 1


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_download_goes_on_and_never_leaves_half_a_file_under_its_name(
    tmp_path: Path, server: HubServer, stop: signal.Signals
) -> None:
    server.files = {SHARD: random.Random(2).randbytes(3_000_000)}
    server.faults[SHARD] = [SLOW]  # so that it is not over before it is interrupted
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "from data_tools import download\n"
        "from mini_llm.data import remote_files\n"
        "remote_files.CHUNK_BYTES = 100\n"
        "download.main()\n"
    )
    flags = ["--dataset", "fineweb", "--endpoint", server.url, "--output_dir", str(tmp_path)]
    tool = subprocess.Popen(
        [sys.executable, "-c", script, *flags], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    part = tmp_path / f"{SHARD}.part"
    deadline = time.monotonic() + 240
    while not part.exists() or part.stat().st_size < 10_000:
        assert time.monotonic() < deadline and tool.poll() is None
        time.sleep(0.001)
    tool.send_signal(stop)
    said = tool.communicate(timeout=240)[1]
    if stop == signal.SIGINT:
        assert tool.returncode == 130 and "run the same command again" in said
    assert not (tmp_path / SHARD).exists()
    kept = part.stat().st_size
    assert 0 < kept < 3_000_000
    run(server, tmp_path)
    assert server.ranges() == [f"bytes={kept}-"]
    assert got(tmp_path) == server.files


# What goes wrong


@pytest.mark.parametrize("source", SOURCES)
def test_server_errors_while_listing_are_tried_again(
    tmp_path: Path, server: HubServer, source: str
) -> None:
    server.faults["list"] = [503, 429, 500]
    run(server, tmp_path, "--dry_run", source=source)
    assert len(server.requests) >= 4


def test_later_page_that_modelscope_denies_by_mistake_is_asked_for_again(
    tmp_path: Path, server: HubServer
) -> None:
    server.page_files = 3
    remote = RemoteDataset("modelscope", "a/b", server.url)
    get = remote._get

    def denied_once(url: str, headers: dict[str, str], **options: object) -> object:
        if options.get("page") == 2 and not server.faults["was"]:
            server.faults["was"], server.faults["list"] = [1], [403]
        return get(url, headers, **options)  # type: ignore[arg-type]

    remote._get = denied_once  # type: ignore[method-assign, assignment]
    assert {file.path for file in remote.list_files()} == set(server.files)


def test_server_that_stays_broken_is_given_up_with_advice_and_keeps_the_rest(
    tmp_path: Path, server: HubServer
) -> None:
    server.faults[SHARD] = [503] * 99
    with pytest.raises(ConnectionError, match=rf"{SHARD} could not be read in 6 .*\(HTTP 503\)"):
        run(server, tmp_path, "--workers", 1)
    assert server.downloads(SHARD) == 6


def test_progress_starts_the_count_of_attempts_again(tmp_path: Path, server: HubServer) -> None:
    server.files[SHARD] = random.Random(3).randbytes(100_000)
    server.faults[SHARD] = [CUT] * 10  # each brings half of what is left
    run(server, tmp_path)
    assert got(tmp_path) == wanted(server)


def test_missing_file_is_named_and_the_others_come(tmp_path: Path, server: HubServer) -> None:
    server.faults[SHARD] = [404]
    with pytest.raises(ValueError, match=rf"1 of 5 files .*{SHARD} does not exist \(HTTP 404\)"):
        run(server, tmp_path)
    assert len(got(tmp_path)) == 4


@pytest.mark.parametrize(("source", "variable"), [("hub", "HF_TOKEN"), ("modelscope", "MODELSCO")])
@pytest.mark.parametrize("status", [401, 403])
def test_refusal_says_which_token_to_set(
    tmp_path: Path, server: HubServer, source: str, variable: str, status: int
) -> None:
    server.faults["list"] = [status]
    with pytest.raises(PermissionError, match=rf"was refused \(HTTP {status}\); set {variable}"):
        run(server, tmp_path, source=source)
    assert len(server.requests) == 1


@pytest.mark.parametrize("source", SOURCES)
def test_unknown_repository_is_one_sentence(tmp_path: Path, server: HubServer, source: str) -> None:
    server.faults["list"] = [404]
    with pytest.raises(FileNotFoundError, match=f"--source {source}: .*does not exist"):
        run(server, tmp_path, source=source)


@pytest.mark.parametrize(("source", "variable"), [("hub", "HF_ENDPOINT"), ("modelscope", "MODEL")])
def test_offline_is_one_sentence_that_says_what_to_do(
    tmp_path: Path, server: HubServer, source: str, variable: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        other = "modelscope" if source == "hub" else "hub"
        flags = ["--endpoint", endpoint, "--source", source, "--output_dir", str(tmp_path)]
        tool = subprocess.run(
            [sys.executable, "data_tools/download.py", "--dataset", "fineweb", *flags],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert tool.returncode == 2
    assert tool.stderr.count("\n") == 1 and "Traceback" not in tool.stderr
    for words in (endpoint, "cannot be reached", "refused", variable, f"--source {other}"):
        assert words in tool.stderr


def test_unknown_host_is_offline_too(tmp_path: Path, server: HubServer) -> None:
    with pytest.raises(ConnectionError, match=r"no-such-host.invalid cannot be reached"):
        RemoteDataset("hub", "a/b", "https://no-such-host.invalid").list_files()


@pytest.mark.parametrize("source", SOURCES)
def test_answer_that_is_no_list_of_files_is_said_to_be_none(server: HubServer, source: str) -> None:
    remote = RemoteDataset(source, "a/b", server.url)
    server.faults["list"] = [200]  # a page of HTML, say
    with pytest.raises(ValueError, match="does not list files as that hub does .*no JSON at"):
        remote.list_files()
    server.sizes[SHARD] = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="does not list files as that hub does .*check --endpoint"):
        remote.list_files()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--dataset", "fineweb", "--endpoint", "mirror"], "--endpoint: mirror is no address"),
        (["--dataset", "deepctrl-zh", "--source", "hub"], "deepctrl-zh is not on hub"),
        (["--dataset", "fineweb", "--files", "0"], "--files must be at least 1, got 0"),
        (["--dataset", "fineweb", "--workers", "0"], "--workers must be at least 1, got 0"),
        ([], "--dataset: give one of fineweb, "),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(flags: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        download.download(download.parse_arguments(flags))


def test_full_disk_is_said_before_anything_is_downloaded(
    tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="--output_dir: .* are needed and 1.0 kB are free"):
        run(server, tmp_path)
    assert not any(server.downloads(path) for path in server.files)


def test_second_download_to_the_same_folder_is_refused_meanwhile(
    tmp_path: Path, server: HubServer
) -> None:
    with (
        FileLock(tmp_path / download.LOCK_NAME),
        pytest.raises(ValueError, match="--output_dir: another process is downloading"),
    ):
        run(server, tmp_path)


# What must not leave


@pytest.mark.parametrize("source", SOURCES)
def test_token_goes_to_the_endpoint_and_not_to_where_it_redirects(
    tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    variable = {"hub": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[source]
    monkeypatch.setenv(variable, "secret")
    server.token = "secret"
    cdn = HubServer(server.files)
    cdn.faults[SHARD] = [CUT]
    server.cdn = cdn
    run(server, tmp_path, source=source)
    cdn.close()
    assert got(tmp_path) == wanted(server)
    assert all(headers["Authorization"] == "Bearer secret" for _, headers in server.requests)
    assert len(cdn.requests) == 6 and cdn.ranges()  # the cut one went on there
    for _, headers in cdn.requests:
        assert "secret" not in str(headers)


def test_list_that_goes_on_at_another_host_is_not_followed(
    tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = HubServer(server.files)
    server.page_files, server.next_host = 2, other.url
    monkeypatch.setenv("HF_TOKEN", "secret")
    with pytest.raises(ValueError, match="--endpoint: .* goes on with its list at another host"):
        run(server, tmp_path)
    other.close()
    assert other.requests == []


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["4_5/../../x.parquet", "/x.parquet", "4_5\\..\\x.parquet"])
def test_names_that_lead_out_of_the_folder_are_refused_before_anything_is_written(
    tmp_path: Path, server: HubServer, source: str, name: str
) -> None:
    server.files[name] = b"evil"
    with pytest.raises(ValueError, match="--output_dir: .* is no name of a file inside"):
        run(server, tmp_path / "out", "--include", "*", source=source)
    assert list(tmp_path.iterdir()) == []


def test_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/4_5").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is no name of a file inside"):
        target_path(tmp_path / "out", "4_5/x.parquet")


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="a./\\:\n é", max_size=12))
def test_a_name_is_refused_or_lies_inside_the_folder(name: str) -> None:
    folder = Path("/tmp/somewhere/out")
    try:
        target = target_path(folder, name)
    except ValueError:
        return
    assert target.resolve().is_relative_to(folder) and target.resolve() != folder


# Archives


def archive(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, member in members.items():
            file.writestr(name, member)
    return content.getvalue()


def get_archive(server: HubServer, folder: Path) -> None:
    flags = ["--dataset", "fineweb-5-percent", "--endpoint", server.url]
    download.download(download.parse_arguments([*flags, "--output_dir", str(folder)]))


def test_archive_is_unpacked_once_and_again_when_it_was_replaced(
    tmp_path: Path, server: HubServer
) -> None:
    name = "x_sampled_5_percent"
    server.files[f"{name}.zip"] = archive({f"{name}/0.parquet": b"old", f"{name}/1.parquet": b"1"})
    get_archive(server, tmp_path)
    assert (tmp_path / name / name / "0.parquet").read_bytes() == b"old"
    stamp = (tmp_path / name / name / "0.parquet").stat().st_mtime_ns
    get_archive(server, tmp_path)
    assert (tmp_path / name / name / "0.parquet").stat().st_mtime_ns == stamp
    server.files[f"{name}.zip"] = archive({f"{name}/0.parquet": b"new"})
    (tmp_path / f"{name}.part").mkdir()  # of an interrupted unpacking
    (tmp_path / f"{name}.part/half.parquet").write_bytes(b"ha")
    get_archive(server, tmp_path)
    unpacked = {path for path in got(tmp_path) if not path.endswith(".zip")}
    assert unpacked == {f"{name}/{name}/0.parquet"}
    assert (tmp_path / name / name / "0.parquet").read_bytes() == b"new"


def test_archive_whose_names_lead_out_is_not_unpacked(tmp_path: Path, server: HubServer) -> None:
    server.files["x_5_percent.zip"] = archive({"ok.parquet": b"1", "../../evil.parquet": b"2"})
    with pytest.raises(ValueError, match=r"'../../evil.parquet' is no name of a file inside"):
        get_archive(server, tmp_path / "a/out")
    assert not list(tmp_path.rglob("*.parquet"))


def test_archive_that_is_none_is_said_to_be_none(tmp_path: Path, server: HubServer) -> None:
    server.files["x_5_percent.zip"] = b"<html>not today</html>"
    with pytest.raises(ValueError, match=r"x_5_percent.zip is no whole zip archive"):
        get_archive(server, tmp_path)
