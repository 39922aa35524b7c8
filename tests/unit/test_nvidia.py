"""What the NVIDIA driver is asked, and how it may fail to answer."""

import time
from pathlib import Path

import pytest

from mini_llm import doctor
from mini_llm.launch import devices
from mini_llm.nvidia import DriverError, ask_driver


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Write a shell script here: it is the only nvidia-smi there is."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))  # the scripts below need no other program
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder / "nvidia-smi"


def write(driver: Path, script: str) -> None:
    driver.write_text(f"#!/bin/sh\n{script}\n")
    driver.chmod(0o755)


def test_each_gpu_is_a_line_of_what_was_asked_for(driver: Path) -> None:
    assert ask_driver("name") == []
    write(driver, 'echo "$1, A"; echo "$1, B"')
    asked = "--query-gpu=name,driver_version"
    assert ask_driver("name", "driver_version") == [f"{asked}, A", f"{asked}, B"]


def test_a_driver_that_fails_is_one_sentence(driver: Path) -> None:
    write(driver, "echo 'No devices were found'; echo more; exit 6")
    with pytest.raises(DriverError) as failed:
        ask_driver("name")
    why = "nvidia-smi is installed but finds no working GPU or driver: No devices were found"
    assert str(failed.value) == why


def test_a_driver_that_hangs_is_given_up(driver: Path) -> None:
    write(driver, "exec /bin/sleep 60")
    begin = time.monotonic()
    with pytest.raises(DriverError, match=r"did not answer within 0 s: the driver or a GPU hangs"):
        ask_driver("name", seconds=0.2)
    assert time.monotonic() - begin < 30


def test_a_driver_that_fails_is_said_by_the_launcher_and_by_doctor(
    driver: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write(driver, "echo 'Driver/library version mismatch'; exit 18")
    why = "finds no working GPU or driver: Driver/library version mismatch"
    assert devices.gpu_count() == 0
    assert why in capsys.readouterr().err
    broken, none = doctor.check_devices()
    assert (broken.status, none.status) == ("note", "ok")
    assert why in broken.detail and "training runs on the CPU" in none.detail
