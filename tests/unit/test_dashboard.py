"""The W&B workspace, read back by W&B's own library, and saved to a loopback server."""

import json
import re

import pytest
import wandb
from wandb_workspaces.workspaces.internal import WorkspaceViewspec

from mini_llm import dashboard
from tests.metrics_page import documented_metrics
from tests.wandb_server import REFUSE, WandbServer


def names_of(pattern: str) -> str:
    return pattern.replace("<i>", "11").replace("<source>", "a.web")


def test_every_documented_number_has_a_panel_and_every_panel_a_documented_metric():
    shown = {m for panels in dashboard.SECTIONS.values() for panel in panels for m in panel.metrics}
    numbers = {row.name for row in documented_metrics() if not row.is_list and not row.is_table}
    assert shown == numbers
    assert [row.name for row in documented_metrics() if row.is_table] == [dashboard.SAMPLES]


def test_what_is_printed_is_the_librarys_own_model_of_those_panels_over_steps(capsys):
    dashboard.main(["--print"])
    spec = WorkspaceViewspec.model_validate_json(capsys.readouterr().out)
    sections = spec.section.panel_bank_config.sections
    assert [section.name for section in sections] == list(dashboard.SECTIONS)
    expected = [panel for panels in dashboard.SECTIONS.values() for panel in panels]
    plots = [p.config for s in sections for p in s.panels if "Line" in p.view_type]
    assert [plot.chart_title for plot in plots] == [panel.title for panel in expected]
    for plot, panel in zip(plots, expected, strict=True):
        assert plot.x_axis == "step"
        name = panel.metrics[0]
        if "<" in name:
            assert plot.use_metric_regex and not plot.metrics
            assert re.search(plot.metric_regex, names_of(name))
            assert not re.search(plot.metric_regex, names_of(name) + "_else")
        else:
            assert tuple(plot.metrics) == panel.metrics
    (table,) = [p for s in sections for p in s.panels if "Line" not in p.view_type]
    assert dashboard.SAMPLES in json.dumps(table.model_dump())


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """No key of whoever runs this."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def test_one_command_saves_it_to_the_project(alone):
    with WandbServer() as server:
        for name, value in server.environment().items():
            alone.setenv(name, value)
        dashboard.main(["--entity", "someone", "--project", "runs"])
        (saved,) = [v for operation, v in server.operations if operation == "UpsertView2"]
    assert (saved["entityName"], saved["projectName"]) == ("someone", "runs")
    WorkspaceViewspec.model_validate_json(saved["spec"])


@pytest.mark.parametrize(
    ("with_key", "reason"), [(False, "no API key"), (True, "the workspace was not saved")]
)
def test_what_cannot_be_saved_is_said_in_one_sentence(alone, capsys, with_key, reason):
    with WandbServer(REFUSE) as server:
        for name, value in server.environment().items():
            if with_key or name != "WANDB_API_KEY":
                alone.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            dashboard.main(["--entity", "someone"])
    assert ended.value.code == 2
    assert f"error: {reason}" in capsys.readouterr().err.splitlines()[-1]
