"""What the NVIDIA driver says of this machine: torch need not be installed, nor able to use it."""

import shutil
import subprocess

SECONDS = 60  # a driver that nobody uses loads first, which takes seconds a GPU


class DriverError(RuntimeError):
    """nvidia-smi is installed, and finds no working GPU or does not answer."""


def ask_driver(*fields: str, seconds: float = SECONDS) -> list[str]:
    """One line of ``fields`` (as nvidia-smi names them) for each GPU; none without nvidia-smi.

    Raises DriverError, with one sentence, where it fails or says nothing for ``seconds``.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # not waited for: what hangs in the driver cannot be ended
        raise DriverError(
            f"nvidia-smi is installed but did not answer within {seconds:.0f} s: the driver or a "
            "GPU hangs; look into the kernel's log (dmesg)"
        ) from None
    if process.returncode:
        said = (output + errors).strip().partition("\n")[0]
        raise DriverError(f"nvidia-smi is installed but finds no working GPU or driver: {said}")
    return output.splitlines()
