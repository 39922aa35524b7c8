"""TensorBoard and W&B over an interruption."""

import shutil

from tests.conftest import TinyData
from tests.launching import TINY_RUN, launch, series


def test_interrupted_run_goes_on_as_one_tensorboard_curve_and_one_wandb_run(
    tiny_data: TinyData, tmp_path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    flags = [*TINY_RUN, *tiny_data.flags, "--output_dir", str(run), "--deepspeed", "none"]
    flags += ["--report_to", "tensorboard,wandb", "--save_steps", "3", "--max_steps", "8"]
    options = {"config": "single", "processes": 1, "env": {"WANDB_MODE": "offline"}}
    launch(*flags, "--stop_at_step", "5", **options)
    # As after a crash: steps 4 and 5 were logged, but not saved.
    shutil.rmtree(run / "checkpoints" / "step-5")
    launch(*flags, **options)

    folder = run / "logs" / "mini-llm"
    assert len(list(folder.glob("events.out.tfevents*"))) == 2
    curve = EventAccumulator(str(folder)).Reload().Scalars("train/loss")
    assert [point.step for point in curve] == list(range(1, 9))
    assert [round(point.value, 4) for point in curve] == [
        round(loss, 4) for loss in series(run, "train/loss")
    ]
    offline = sorted((run / "logs" / "wandb").glob("offline-run-*"))
    assert len(offline) == 2
    assert len({path.name.rsplit("-", 1)[1] for path in offline}) == 1  # the id of the run
