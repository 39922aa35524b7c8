"""What TensorBoard and W&B were given, beside metrics.jsonl."""

from pathlib import Path

import pytest

from tests.launching import metrics
from tests.wandb_server import recorded_history


def assert_trackers_have_what_metrics_jsonl_has(run: Path, *, tensorboard: bool = True) -> None:
    """W&B's files, and TensorBoard's: every number of every logged step, and nothing else."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = {
        line["step"]: {
            name: value
            for name, value in line.items()
            if name != "step" and value is not None and not isinstance(value, list)
        }
        for line in metrics(run)
    }
    recorded = recorded_history(run)
    for values in recorded.values():
        values.pop("samples/answers", None)
    assert recorded == expected
    if not tensorboard:
        return
    board = EventAccumulator(str(run / "logs" / "mini-llm")).Reload()
    tags = board.Tags()
    assert set(tags["scalars"]) == {name for values in expected.values() for name in values}
    for name in tags["scalars"]:
        for point in board.Scalars(name):
            assert point.value == pytest.approx(expected[point.step][name], rel=1e-6)
