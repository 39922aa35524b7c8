"""A rank's log holds what the rank printed, whatever way it went."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import logging, os, sys
from pathlib import Path
from mini_llm.parallel import rank_log

handler = logging.StreamHandler()  # a library's, made at its import
logging.getLogger("library").addHandler(handler)
print("before")
rank_log.open_rank_log(Path(sys.argv[1]))
{rest}
"""


def run(output_dir: Path, rest: str, rank: str = "3") -> tuple[subprocess.CompletedProcess, str]:
    """Run SCRIPT with these lines at its end; what it did, and its log."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(rest=rest), str(output_dir)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"RANK": rank, "WORLD_SIZE": "4", "PATH": "/usr/bin:/bin"},
    )
    return done, (output_dir / "logs" / f"rank-{rank}.log").read_text()


def test_prints_warnings_and_loggers_go_to_the_terminal_and_to_the_log(tmp_path):
    done, log = run(
        tmp_path,
        "print('to stdout')\n"
        "print('to stderr', file=sys.stderr)\n"
        "logging.getLogger('library').warning('from a library')\n"
        "rank_log.note('for the log alone')",
    )
    header, *lines = log.splitlines()
    assert "rank 3 of 4 starts on" in header and header.startswith("=== ")
    assert lines == ["to stdout", "to stderr", "from a library", "for the log alone"]
    assert done.stdout == "before\nto stdout\n"
    assert done.stderr == "to stderr\nfrom a library\n"


def test_the_traceback_of_an_exception_is_in_the_log(tmp_path):
    done, log = run(tmp_path, "raise ValueError('broken row')")
    assert log.endswith("ValueError: broken row\n") and "Traceback" in log
    assert done.returncode == 1 and done.stderr.endswith("ValueError: broken row\n")


def test_a_rank_that_is_killed_loses_no_line(tmp_path):
    done, log = run(tmp_path, "print('last words')\nos.kill(os.getpid(), 9)")
    assert done.returncode == -9 and log.endswith("last words\n")


def test_a_segmentation_fault_leaves_its_python_stack(tmp_path):
    done, log = run(tmp_path, "import faulthandler\nfaulthandler._sigsegv()")
    assert done.returncode == -11 and "Segmentation fault" in log and "line" in log


def test_every_start_adds_to_the_log(tmp_path):
    run(tmp_path, "print('one')")
    _, log = run(tmp_path, "print('two')")
    assert [line for line in log.splitlines() if not line.startswith("===")] == ["one", "two"]
    assert log.count("=== ") == 2


def test_a_progress_bar_is_not_in_the_log(tmp_path):
    done, log = run(tmp_path, "sys.stderr.write('\\r 50%')\nprint('a line')")
    assert "50%" in done.stderr and "50%" not in log and log.endswith("a line\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_that_cannot_be_written_is_said_once_and_does_not_end_the_run(tmp_path):
    done, _ = run(
        tmp_path,
        "rank_log._file = open('/dev/full', 'w', buffering=1)\nprint('one')\nprint('two')",
    )
    assert done.returncode == 0 and done.stdout.endswith("one\ntwo\n")
    assert done.stderr.count("cannot be written any more") == 1


def test_a_rank_whose_terminal_is_closed_goes_on_to_its_save(tmp_path):
    """Its log says so, and keeps what is printed from then on."""
    ours, theirs = pty.openpty()
    rest = (
        "print('ready', flush=True)\nsys.stdin.read(1)\nprint('saving', flush=True)\nprint('saved')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(rest=rest), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
        env={"PATH": "/usr/bin:/bin"},
    ) as rank:
        os.close(theirs)
        seen = b""
        while b"ready" not in seen:
            seen += os.read(ours, 1000)
        os.close(ours)
        rank.communicate(b"x", timeout=120)
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert rank.returncode == 0
    assert "\nsaving\n\nnobody reads <stdout> any more (" in log and log.endswith("\nsaved\n")
