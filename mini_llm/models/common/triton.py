"""Whether Triton, which torch.compile and fla make GPU kernels with, can work on this machine."""

import os
import shutil
import subprocess
import sysconfig


def missing_for_triton() -> str | None:
    """What Triton, which builds a module for Python before its first kernel, does not find here.

    It calls the C compiler that CC names, else gcc or clang. Without one, or without Python's
    headers, the first forward pass would end in a traceback of torch.compile's.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        return f"a C compiler and there is none{f' named {compiler} (CC)' if compiler else ''}"
    headers = sysconfig.get_path("include", "posix_prefix")
    done = subprocess.run(
        [compiler, "-fsyntax-only", "-x", "c", f"-I{headers}", "-"],
        input=b"#include <Python.h>\n",
        capture_output=True,
    )
    return f"Python.h, which {compiler} does not find" if done.returncode else None
