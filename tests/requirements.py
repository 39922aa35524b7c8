"""What some tests need of the machine: skipped without it, which CI=true makes a failure."""

import os
from pathlib import Path

import pytest


def require_debian_package(package: str, path: Path) -> None:
    """Skip the test unless `path`, which the Debian package brings, exists; fail where CI=true."""
    if path.exists():
        return
    reason = f"the Debian package {package} is not installed ({path} is missing)"
    if os.environ.get("CI") == "true":
        pytest.fail(
            f"{reason}; ./launch.sh test installs it where apt-get and the rights are there"
        )
    pytest.skip(reason)
