"""The doctor's findings: what is broken, what is merely worth knowing, and no hang."""

import importlib.metadata
import os
import shutil
import sys
import time
from pathlib import Path

import psutil
import pytest

from mini_llm import doctor


def findings(status: str, found: list[doctor.Finding]) -> dict[str, str]:
    return {finding.subject: finding.detail for finding in found if finding.status == status}


def pretend_installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    """Make the metadata say that mini_llm requires and the environment holds these versions."""

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    requires = ["torch>=2.11", "wandb>=0.20", "numpy>=2.0", "pytest>=8; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: requires)
    monkeypatch.setattr(importlib.metadata, "version", version)


def test_versions_tell_missing_and_too_old_from_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, {"torch": "2.10.0", "numpy": "2.0.1"})
    found = list(doctor.check_versions())
    assert findings("FAIL", found).keys() == {"torch", "wandb"}
    assert ">=2.11 is needed" in findings("FAIL", found)["torch"]
    tested = doctor.tested_versions()["numpy"]
    assert findings("note", found) == {"numpy": f"2.0.1 (tested: {tested})"}


def test_a_local_build_of_the_tested_version_is_the_tested_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tested = doctor.tested_versions()
    installed = {"torch": "2.13.0+cpu", "wandb": tested["wandb"], "numpy": tested["numpy"]}
    pretend_installed(monkeypatch, installed)
    ok = findings("ok", list(doctor.check_versions()))
    assert ok.keys() == {"python", *installed}
    assert ok["torch"] == "2.13.0+cpu"


def test_a_missing_compiler_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    found = list(doctor.check_machine())
    assert "C++ compiler" in findings("note", found)
    assert not findings("FAIL", found)


def test_no_gpu_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "ask_driver", lambda *_: [])
    (only,) = doctor.check_devices()
    assert only.status == "ok"
    assert "no CUDA GPU" in only.detail


@pytest.mark.parametrize(("cuda", "status"), [(None, "note"), ("13.0", "FAIL")])
def test_a_gpu_that_torch_cannot_use_is_said(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, status: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr(doctor, "ask_driver", lambda *_: ["Test GPU, 80 GiB, 535.1"])
    (only,) = doctor.check_devices()
    assert (only.status, only.subject) == (status, "GPU")
    assert "Test GPU" in only.detail


def test_a_stale_build_lock_is_removed_and_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert str(lock) in findings("note", list(doctor.check_build_locks()))["DeepSpeed build lock"]
    assert not lock.exists()
    assert findings("ok", list(doctor.check_build_locks()))


def test_a_launch_that_hangs_is_ended_with_all_its_children_and_its_output_kept() -> None:
    child = "import time; time.sleep(60)"
    parent = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True); "
        "print('child', p.pid, flush=True); time.sleep(60)"
    )
    started = time.monotonic()
    command = [sys.executable, "-c", parent]
    code, output = doctor.run_with_timeout(command, dict(os.environ), timeout=6.0)
    assert time.monotonic() - started < 45
    assert code is None
    pid = int(output.split()[1])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_probe_that_fails_shows_the_end_of_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run_with_timeout", lambda *_: (1, "first\nRuntimeError: why\n"))
    finding = doctor.run_probe(2, "the CPU", visible_gpus="")
    assert finding.status == "FAIL"
    assert "exit status 1" in finding.detail
    assert finding.detail.endswith("| RuntimeError: why")


def test_a_probe_that_never_ran_is_not_taken_for_a_good_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "run_with_timeout", lambda *_: (0, "nothing was started\n"))
    assert doctor.run_probe(2, "the CPU", visible_gpus="").status == "FAIL"


def test_the_probe_passes_on_two_ranks_of_this_machine() -> None:
    finding = doctor.run_probe(2, "the CPU", visible_gpus="")
    assert finding.status == "ok", finding.detail
    assert "all 2 ranks belong to one job of 2" in finding.detail
    assert "each rank holds 1/2 of the optimizer state" in finding.detail


@pytest.mark.slow
def test_the_probe_fails_where_the_engine_does_not_partition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "PROBE_CONFIG", "accelerate_configs/zero0.yaml")
    finding = doctor.run_probe(2, "the CPU", visible_gpus="")
    assert finding.status == "FAIL"
    assert "does not hold: the engine is DeepSpeed ZeRO-1" in finding.detail


def test_a_torch_that_cannot_be_imported_is_a_line_of_the_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "check_machine", list)
    (broken,) = [found for found in doctor.check_everything() if found.status == "FAIL"]
    assert broken.subject == "torch" and "cannot be imported" in broken.detail


def test_a_kernel_that_is_on_the_path_without_being_installed_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "KERNELS", {"no-such-distribution": "json"})
    (only,) = doctor.check_kernels()
    assert only.detail == "no-such-distribution of unknown version"


def test_the_exit_status_tells_a_broken_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor"])
    for name in ("check_machine", "check_devices", "check_kernels", "check_build_locks"):
        monkeypatch.setattr(doctor, name, list)
    monkeypatch.setattr(doctor, "check_versions", lambda: [doctor.Finding("note", "a", "b")])
    monkeypatch.setattr(doctor, "check_deepspeed", list)
    assert doctor.main() == 0
    broken = [doctor.Finding("FAIL", "DeepSpeed start", "hung")]
    monkeypatch.setattr(doctor, "check_deepspeed", lambda: broken)
    assert doctor.main() == 1
