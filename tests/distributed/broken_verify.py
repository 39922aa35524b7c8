"""`./launch.sh verify` with something wrong on purpose: ``broken_verify.py FAULT verify FLAGS``.

``preflight``: rank 1 is slow and has another torch. ``engine``: of the engines only ZeRO-2, which
loses a part of every gradient.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mini_llm.launch.__main__ import main
from mini_llm.launch.options import Options
from mini_llm.verify import driver
from mini_llm.verify.equivalence import DENSE, Run, reference

FAULT = sys.argv[1]
whole = Options.program.fget  # type: ignore[attr-defined]


def program(options: Options) -> list[str]:
    """The faulty ranks in the place of those that the fault is about."""
    is_meant = (
        options.recipe == "verify" if FAULT == "preflight" else "zero2" in options.config_file
    )
    return ["tests/distributed/broken_rank.py", FAULT] if is_meant else list(whole(options))


Options.program = property(program)  # type: ignore[assignment, method-assign]
driver.plan_runs = lambda world_size, gpu: [reference(DENSE), Run("zero2")]
sys.exit(main(sys.argv[2:]))
