"""Output that nobody reads any more must not end what still has to be saved."""

import errno
import os
from typing import TextIO


def go_on_without(stream: TextIO, error: OSError) -> None:
    """Let what is written to ``stream`` go nowhere from now on, what it still buffers too.

    For an ``error`` of writing to a terminal that was closed, or to a pipe whose reader has ended;
    any other is raised.
    """
    if error.errno not in (errno.EIO, errno.EPIPE):
        raise error
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
