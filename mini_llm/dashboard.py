"""``python -m mini_llm.dashboard``: a W&B workspace with the metrics of docs/metrics.md.

Saved with ``--entity`` and ``--project``; ``--print`` shows it as JSON, without a network.
"""

import re
import sys
from dataclasses import dataclass
from typing import Any

from mini_llm.command_line import Parser
from mini_llm.training.wandb_tracker import PROJECT, SAMPLES, STEP

NAME = "mini-llm"


@dataclass(frozen=True)
class Panel:
    """Curves of metrics over steps. A name may be a pattern, e.g. ``eval/<source>/loss``."""

    title: str
    metrics: tuple[str, ...]
    unit: str = ""
    logarithmic: bool = False
    stacked: bool = False


LAYER = "moe/layer_<i>"
PARTS = ("data", "forward", "backward", "optimizer")
SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Loss": (
        Panel("Training loss", ("train/loss",), "nats per token"),
        Panel("Held-out loss", ("eval/<source>/loss",), "nats per token"),
        Panel("Held-out bits per byte", ("eval/<source>/bits_per_byte",), "bits per byte"),
        Panel("Perplexity", ("train/perplexity",), logarithmic=True),
        Panel("Multi-token prediction", ("train/mtp_loss",), "nats per token"),
        Panel("Load-balance loss", ("train/balance_loss",)),
    ),
    "Optimizer": (
        Panel("Gradient norm before clipping", ("train/grad_norm",), logarithmic=True),
        Panel("Learning rate", ("train/lr",)),
        Panel("Bad steps", ("train/bad_steps",), "steps"),
    ),
    "Speed and memory": (
        Panel("Throughput", ("perf/tokens_per_second",), "tokens/s"),
        Panel("Model FLOP/s utilisation", ("perf/mfu",), "share of the peak"),
        Panel(
            "Where a step's time goes",
            tuple(f"perf/{part}_seconds" for part in PARTS),
            "s per step",
            stacked=True,
        ),
        Panel("Step", ("perf/step_seconds",), "s per step"),
        Panel("Communication", ("perf/communication_seconds",), "s per step"),
        Panel("Peak memory of a rank", ("perf/peak_memory_bytes",), "bytes"),
    ),
    "Data": (
        Panel("Tokens", ("train/tokens",), "tokens"),
        Panel("Tokens by source", ("data/<source>/tokens",), "tokens"),
        Panel("Rejected", ("data/<source>/rejected",), "rows"),
        Panel("Supervised tokens of a step", ("train/supervised_tokens",), "tokens"),
        Panel("Passes over the data", ("train/epoch",)),
    ),
    "Experts": (
        Panel("Busiest expert over the mean", (f"{LAYER}/load_max_over_mean",)),
        Panel("Busiest expert over the idlest", (f"{LAYER}/load_max_over_min",), logarithmic=True),
        Panel("Dead experts", ("moe/dead_experts",), "experts"),
        Panel("Spread of router biases", (f"{LAYER}/bias_spread",)),
        Panel("Busiest rank over the mean", (f"{LAYER}/rank_load_max_over_mean",)),
        Panel("Rows between ranks", ("ep/rows_sent",), "rows per step"),
        Panel("Bytes between ranks", ("ep/bytes_sent",), "bytes per step"),
        Panel("All-to-alls, host's time", ("ep/all_to_all_seconds",), "s per step"),
    ),
    "Samples": (
        Panel("Answers that ended by themselves", ("samples/stopped",), "share"),
        Panel("Length of answers", ("samples/tokens",), "tokens"),
    ),
}


def build_workspace(entity: str, project: str, name: str = NAME) -> Any:
    """The workspace, not yet saved. Raises ImportError without ``wandb-workspaces``."""
    import wandb_workspaces.reports.v2 as parts
    import wandb_workspaces.workspaces as workspaces

    sections = []
    for title, panels in SECTIONS.items():
        drawn = [_line_plot(parts, panel) for panel in panels]
        if title == "Samples":
            drawn.append(parts.WeavePanelSummaryTable(table_name=SAMPLES))
        sections.append(workspaces.Section(name=title, panels=drawn, is_open=True))
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
    )


def _line_plot(parts: Any, panel: Panel) -> Any:
    is_pattern = "<" in panel.metrics[0]
    return parts.LinePlot(
        title=panel.title,
        x=STEP,
        y=[] if is_pattern else list(panel.metrics),
        metric_regex=expression(panel.metrics[0]) if is_pattern else None,
        title_x="optimizer step",
        title_y=panel.unit or None,
        log_y=panel.logarithmic or None,
        plot_type="stacked-area" if panel.stacked else None,
    )


def expression(pattern: str) -> str:
    """``eval/<source>/loss`` as the regular expression of the names that it stands for."""
    placeholders = {"<i>": r"\d+", "<source>": ".+"}
    pieces = re.split(r"(<\w+>)", pattern)
    return "^" + "".join(placeholders.get(p) or p.replace(".", r"\.") for p in pieces) + "$"


def main(words: list[str] | None = None) -> None:
    """Save the workspace, or print it."""
    parser = Parser(prog="python -m mini_llm.dashboard", description=__doc__)
    parser.add_argument("--entity", help="user or team in W&B")
    parser.add_argument("--project", default=PROJECT, help="project of the runs [%(default)s]")
    parser.add_argument("--name", default=NAME, help="name of the workspace [%(default)s]")
    parser.add_argument("--print", action="store_true", help="show it as JSON; save nothing")
    args = parser.parse_args(words)
    if not (args.entity or args.print):
        parser.error("--entity is missing: the user or team in W&B whose project it is")
    try:
        workspace = build_workspace(args.entity or "ENTITY", args.project, args.name)
    except ImportError as error:
        parser.error(
            f"{error}; install it with: pip install -c mini_llm/constraints.txt -e '.[dashboard]'"
        )
    if args.print:
        print(
            workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=2)
        )
        return
    import wandb

    try:
        if not wandb.login(prompt=False):
            parser.error("no API key; give WANDB_API_KEY, or run `wandb login`")
        workspace.save()
    except (wandb.Error, ValueError, OSError) as error:
        parser.error(f"the workspace was not saved ({' '.join(str(error).split())})")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
