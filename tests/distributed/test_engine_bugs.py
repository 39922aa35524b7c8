"""The fault of DeepSpeed for which ZeRO-0 in bf16 is refused is still there."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPRODUCTIONS = Path(__file__).with_name("engine_reproductions.py")


def test_zero_0_in_bf16_has_stepped_and_decayed_before_the_first_step():
    done = subprocess.run(
        [sys.executable, str(REPRODUCTIONS)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    untouched = {"steps": 0, "weights": [1.0, 1.0]}
    assert facts.pop("ZeRO-0 bf16") == {"steps": 1, "weights": [0.75, 0.75]}, (
        "mended: drop the refusal of --bf16 true with ZeRO-0 from engine.fill_deepspeed_config, "
        "clip in DeepSpeed there, and add zero0 to BF16_ENGINES of test_engines.py"
    )
    assert all(fact == untouched for fact in facts.values()), facts
