"""Pictures of a run, drawn from its metrics.jsonl alone."""

import json
from pathlib import Path
from typing import Any


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run folder, in order."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def plot_loss(run: Path) -> Path:
    """Draw training and held-out loss over optimizer steps to ``plots/loss.png``; return it."""
    import matplotlib

    matplotlib.use("Agg")  # no display on a training machine
    from matplotlib import pyplot

    steps = read_metrics(run)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    train = [(m["step"], m["train/loss"]) for m in steps if "train/loss" in m]
    axes.plot(*zip(*train, strict=True), label="training", linewidth=1, color="tab:blue")
    names = sorted({key for m in steps for key in m if key[:5] == "eval/" and key[-5:] == "/loss"})
    for name, color in zip(
        names, ["tab:orange", "tab:green", "tab:red", "tab:purple"] * 8, strict=False
    ):
        held_out = [(m["step"], m[name]) for m in steps if name in m]
        axes.plot(
            *zip(*held_out, strict=True),
            label=f"held-out {name.split('/')[1]}",
            marker="o",
            markersize=4,
            color=color,
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = run / "plots" / "loss.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
    return path
