"""On every node: one launch after the other, within the time; node 0 makes the table."""

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mini_llm.command_line import UsageError
from mini_llm.doctor import LAUNCHER_SPEAKS, wait_or_kill
from mini_llm.launch import network
from mini_llm.launch.command import REPOSITORY, Launch, build_launch
from mini_llm.launch.devices import gpu_count
from mini_llm.launch.nodes import Nodes
from mini_llm.launch.options import DEFAULT_CONFIG, Options
from mini_llm.launch.supervise import end_with_parent

from .arguments import VerifyFlags, parse_flags
from .equivalence import Run, absent_rows, build_data, compare, plan_runs
from .meeting import Meeting, Outcome
from .table import Row, exit_status, read_rows, summary, terminal_table, write_report

LAUNCH_SECONDS = 180.0  # until a launch that should take some 20 is ended
FIRST_GUESS_SECONDS = 30.0  # what a launch takes, as long as none was seen
PREFLIGHT_SHARE = 0.5  # of the time, at most,
PAIRS_SHARE = 0.2  # and for its pairs
SAY = 3  # nodes whose words a failure shows
HEAR_SECONDS = 60.0  # after its time, until a node that does not report is lost
# All of them in full fp32, also where the environment says otherwise.
ENVIRONMENT = {"NVIDIA_TF32_OVERRIDE": "0", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass(frozen=True)
class Step:
    """What every node does at the same time, or node 0 alone, and the row that it belongs to."""

    check: str
    log_name: str
    launch: Launch | None  # None: build the data
    everywhere: bool = True


class Driver:
    """What the nodes have agreed on, and this node's way to run a step."""

    def __init__(self, options: Options, nodes: Nodes, processes: int) -> None:
        self.options, self.nodes, self.processes = options, nodes, processes
        self.flags: VerifyFlags = parse_flags(options)
        self.world_size = nodes.count * processes
        self.output_dir = self.flags.output_dir.absolute()

    # ------------------------------------------------------------ the plan

    def plan(self) -> dict[str, Any]:
        """Node 0's, for all: its flags, whether it has GPUs, and a name for this verify's files."""
        return {
            "output_dir": str(self.output_dir),
            "max_minutes": self.flags.max_minutes,
            "skip": self.flags.skip,
            "gpu": gpu_count() > 0,
            "stamp": time.strftime("%Y%m%d-%H%M%S"),
        }

    def agree_on_plan(self, plan: dict[str, Any]) -> None:
        """Take node 0's plan, whatever this node was told."""
        self.output_dir = Path(plan["output_dir"])
        self.flags = VerifyFlags(self.output_dir, plan["max_minutes"], plan["skip"])
        self.gpu: bool = plan["gpu"]
        self.work = self.output_dir / f"verify-{plan['stamp']}"
        runs = [] if self.flags.skip == "equivalence" else plan_runs(self.world_size, gpu=self.gpu)
        self.runs: dict[str, Run] = {run.check: run for run in runs}

    def make_work_folder(self) -> str | None:
        """A folder for logs and runs, old ones removed; returns why it cannot be there.

        A temporary folder serves then, so that the preflight can still say all it finds.
        """
        try:
            for old in self.output_dir.glob("verify-[0-9]*"):
                if old != self.work:
                    shutil.rmtree(old, ignore_errors=True)  # another node may be at it
            self.work.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.work):
                return None
        except OSError as error:
            self.work = Path(tempfile.mkdtemp(prefix="verify-"))
            return error.strerror or str(error)

    def steps(self) -> list[Step]:
        """The same on every node."""
        steps = []
        if self.flags.skip != "preflight":
            steps.append(Step("preflight", "preflight", self.preflight_launch(self.work)))
        if self.runs:
            steps.append(Step("data", "data", None))
        for run in self.runs.values():
            for part in range(run.parts):
                name = run.name if part == 0 else f"{run.name}-{part + 1}"
                launch = self.run_launch(run, part)
                steps.append(Step(run.check, name, launch, everywhere=not run.is_reference))
        return steps

    def print_commands(self) -> None:
        """Of this node, each with its environment, to be pasted into a shell."""
        for number, step in enumerate(self.steps()):
            if step.launch is not None and (step.everywhere or self.nodes.rank == 0):
                variables = {**step.launch.variables, **ENVIRONMENT}
                words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
                print(" ".join([*words, shlex.join(step.launch.command(number + 1))]))

    def preflight_launch(self, work: Path) -> Launch:
        """`mini_llm.verify.preflight` on all ranks."""
        seconds = self.flags.max_minutes * 60 * PAIRS_SHARE
        flags = ["--output_dir", str(self.output_dir), "--result", str(work / "preflight")]
        return self._launch(DEFAULT_CONFIG, "verify", [*flags, "--seconds", f"{seconds:.0f}"])

    def run_launch(self, run: Run, part: int) -> Launch:
        """The recipe; a reference on one process of node 0."""
        flags = run.flags(self.work, self.world_size, part)
        config = f"accelerate_configs/{run.config}.yaml"
        if not run.is_reference:
            return self._launch(config, "pretrain", flags)
        options = dataclasses.replace(
            self.options, recipe="pretrain", config_file=config, recipe_flags=flags
        )
        # As many threads as a rank has: with more, sums would be in another order.
        threads = self._launch(config, "pretrain", flags).threads
        alone = build_launch(options, Nodes(), 1, os.environ)
        variables = {**alone.variables, "OMP_NUM_THREADS": str(threads)}
        return dataclasses.replace(alone, threads=threads, variables=variables)

    def _launch(self, config: str, recipe: str, flags: list[str]) -> Launch:
        options = dataclasses.replace(
            self.options, recipe=recipe, config_file=config, recipe_flags=flags
        )
        return build_launch(options, self.nodes, self.processes, os.environ)

    # ------------------------------------------------------------ a step

    def do(self, number: int, step: Step, seconds: float) -> Outcome:
        """This node's part of a step, ended after ``seconds``."""
        if step.launch is None:
            try:
                build_data(self.work / "data")
            except (RuntimeError, OSError) as error:
                return Outcome(1, str(error))
            return Outcome(0)
        log = self.work / "logs" / f"{step.log_name}-node{self.nodes.rank}.log"
        log.parent.mkdir(exist_ok=True, parents=True)
        # A port of its own for each; the store of the drivers has the first.
        command = step.launch.command(number + 1)
        with log.open("w") as output:
            output.write(f"{shlex.join(command)}\n")
            output.flush()
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, **step.launch.variables, **ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which ends that one
                preexec_fn=end_with_parent,
            )
            status = wait_or_kill(process, seconds)
        if status == 0:
            return Outcome(0)
        return Outcome(status, f"{telling_line(log.read_text(errors='replace'))} (see {log})")


def telling_line(log: str) -> str:
    """The line of a failed launch's output that says most: the first error of a rank's own."""
    lines = [line.strip() for line in log.partition(LAUNCHER_SPEAKS)[0].splitlines()[1:]]
    lines = [line for line in lines if line and not re.match(r"\[W\d", line)]  # torch's warnings
    error = re.compile(r"(\[rank\d+\]: )?[\w.]*([Ee]rror|Exception)\b")
    return next((line for line in lines if error.match(line)), lines[-1] if lines else "no output")


# ---------------------------------------------------------------- nodes


def verify(options: Options, nodes: Nodes, processes: int) -> int:
    """All of it on this node; returns the exit status, the same on every node.

    Raises UsageError if the nodes do not come together or cannot work together.
    """
    driver = Driver(options, nodes, processes)
    if options.print:
        driver.agree_on_plan({**driver.plan(), "stamp": "TIME"})
        driver.print_commands()
        return 0
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _leave)  # by way of the `finally` that ends the launch
    if nodes.count > 1:
        print(driver.preflight_launch(driver.output_dir).start_block(os.environ), flush=True)
    meeting = Meeting(nodes, options.rendezvous_timeout)
    meeting.tell(f"node/{nodes.rank}", {"host": network.host_name(), "processes": processes})
    check_same_processes(meeting)
    if nodes.rank == 0:
        meeting.tell("plan", driver.plan())
    plan = meeting.hear("plan", HEAR_SECONDS)
    if plan is None:
        raise UsageError("node 0 does not answer; see what it says")
    driver.agree_on_plan(plan)
    why_not = driver.make_work_folder()
    if nodes.rank == 0:
        status = Main(driver, meeting, why_not).run()
        meeting.tell("status", status)
    else:
        status = follow(driver, meeting)
    meeting.say_farewell()
    return status


def check_same_processes(meeting: Meeting) -> None:
    """Of every node as many, or the ranks would wait for ever. Raises UsageError on all nodes."""
    found: dict[int, Any] = {}
    for node in range(meeting.nodes.count):
        theirs = found[node] = meeting.hear(f"node/{node}", meeting.patience)
        if theirs is None:
            raise meeting.absent(node)
        ours, count = found[0]["processes"], theirs["processes"]
        if count != ours:
            raise UsageError(
                f"node {node} ({theirs['host']}) starts {count} process(es), node 0 {ours}; give "
                "all nodes the same --procs_per_node"
            )


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def follow(driver: Driver, meeting: Meeting) -> int:
    """A node other than 0: do what that one says. Returns its exit status."""
    patience = driver.flags.max_minutes * 60 + HEAR_SECONDS
    for number, step in enumerate(driver.steps()):
        seconds = meeting.hear(f"step/{number}", patience)
        if seconds is None:
            print("launch.sh: verify: node 0 does not answer any more", file=sys.stderr)
            return 1
        if seconds and step.everywhere:
            print(f"{step.log_name} …", flush=True)
            outcome = driver.do(number, step, seconds)
            meeting.tell(f"outcome/{number}/{driver.nodes.rank}", dataclasses.asdict(outcome))
    status = meeting.hear("status", HEAR_SECONDS)
    print(f"the table is on node 0, in {driver.output_dir}")
    return 1 if status is None else int(status)


class Main:
    """Node 0: decides, judges, reports."""

    def __init__(self, driver: Driver, meeting: Meeting, why_no_folder: str | None) -> None:
        self.driver, self.meeting = driver, meeting
        self.why_no_folder = why_no_folder
        self.rows: list[Row] = []
        self.began = time.monotonic()
        self.longest = 0.0  # run that ended well, in seconds
        self.stopped = ""  # why nothing more can run

    def run(self) -> int:
        """All steps, the table, and the exit status."""
        steps = self.driver.steps()
        for number, step in enumerate(steps):
            if any(row.check == step.check for row in self.rows):
                self.meeting.tell(f"step/{number}", 0)  # an earlier part of it went wrong
                continue
            is_last_part = not any(later.check == step.check for later in steps[number + 1 :])
            self._add(self._do(number, len(steps), step, is_last_part))
        if self.why_no_folder is not None and not any(row.check == "disk" for row in self.rows):
            text = f"{self.driver.output_dir} cannot be written: {self.why_no_folder}"
            self.rows.append(Row("disk", "FAIL", "", text))
        if self.driver.runs:
            self.rows += absent_rows(self.driver.world_size, gpu=self.driver.gpu)
        if self.driver.flags.skip is not None:
            self.rows.append(Row(self.driver.flags.skip, "skipped", "", "asked for by --skip"))
        return self._report()

    def _add(self, rows: list[Row]) -> None:
        self.rows += rows
        for row in rows:
            if row.verdict != "ok":
                print(f"      {row.check}: {row.verdict}, {row.result}", flush=True)

    def _left(self) -> float:
        return self.driver.flags.max_minutes * 60 - (time.monotonic() - self.began)

    def _do(self, number: int, count: int, step: Step, is_last_part: bool) -> list[Row]:
        """Run a step on the nodes it is for; rows unless another part follows."""
        reason, seconds = self._limit(step)
        self.meeting.tell(f"step/{number}", seconds)
        if not seconds:
            return [Row(step.check, "skipped", "", reason)]
        print(f"[{number + 1}/{count}] {step.log_name} …", flush=True)
        started = time.monotonic()
        outcomes = {0: self.driver.do(number, step, seconds)}
        if step.everywhere:
            end = started + seconds + HEAR_SECONDS
            for node in range(1, self.driver.nodes.count):
                patience = max(end - time.monotonic(), 1)
                heard = self.meeting.hear(f"outcome/{number}/{node}", patience)
                if heard is None:
                    self.stopped = f"node {node} does not answer any more"
                    heard = {"status": 1, "said": self.stopped}
                outcomes[node] = Outcome(**heard)
        failed = {node: outcome for node, outcome in outcomes.items() if not outcome.is_ok}
        if step.check in self.driver.runs and not failed:
            self.longest = max(self.longest, time.monotonic() - started)
        if failed:
            return [self._failure(step, failed, seconds)]
        if step.check == "preflight":
            rows = read_rows(self.driver.work / "preflight")
            if any(row.check == "disk" and row.verdict == "FAIL" for row in rows):
                self.stopped = "the checkpoint path cannot be written, see disk"
            if any(row.check == "disk: shared" and row.verdict == "FAIL" for row in rows):
                self.stopped = "a run needs one folder that all nodes share, see disk: shared"
            return rows
        if step.launch is None or not is_last_part:
            return []
        return [compare(self.driver.runs[step.check], self.driver.work, self.driver.world_size)]

    def _limit(self, step: Step) -> tuple[str, float]:
        """Seconds for a step; 0 and a reason if it is not run."""
        if self.stopped:
            return self.stopped, 0
        if self.why_no_folder is not None and step.check != "preflight":
            return f"{self.driver.output_dir} cannot be written: {self.why_no_folder}", 0
        run = self.driver.runs.get(step.check)
        if run is not None and not run.is_reference:
            wanted = run.reference().check
            if not any(row.check == wanted and row.verdict == "ok" for row in self.rows):
                return f"there is nothing to compare with, see {wanted}", 0
        left = max(self._left(), 0)
        needed = self.longest * 1.2 if self.longest else FIRST_GUESS_SECONDS
        if left < needed:
            return f"needs about {needed:.0f} s, of --max_minutes {left:.0f} s were left", 0
        if step.check == "preflight":
            return "", left * PREFLIGHT_SHARE if self.driver.runs else left
        return "", min(left, LAUNCH_SECONDS)

    def _failure(self, step: Step, failed: dict[int, Outcome], seconds: float) -> Row:
        # Those that ended by themselves know more than those that waited until their time was up.
        ended = {node: one for node, one in failed.items() if one.status is not None}
        telling = [*(ended or failed).items()][:SAY]
        said = "; ".join(f"node {node}: {one.said}" for node, one in telling)
        if step.check in ("preflight", "data"):
            self.stopped = f"{step.check} did not end well"
        if ended:
            return Row(step.check, "FAIL", "", said)
        if self._left() <= 1 and step.check != "preflight":
            return Row(step.check, "skipped", "", f"the time of --max_minutes ran out: {said}")
        text = f"did not end within {seconds:.0f} s; the last of it: {said}"
        return Row(step.check, "FAIL", "", text)

    def _report(self) -> int:
        rows, driver = self.rows, self.driver
        about = {
            "when": time.strftime("%Y-%m-%d %H:%M:%S"),
            "where": f"{driver.world_size} rank(s) on {driver.nodes.count} node(s), node 0 is "
            f"{network.host_name()}, {'GPU' if driver.gpu else 'CPU'}",
            "seconds": round(time.monotonic() - self.began),
        }
        print(f"\n{terminal_table(rows)}\n")
        print(f"verify: {summary(rows)}; {about['where']}; {about['seconds']} s")
        if self.why_no_folder is not None:
            print(f"{driver.output_dir} cannot be written, so the table stands here alone")
            return exit_status(rows)
        write_report(driver.output_dir, rows, about)
        for run in driver.runs.values():
            if any(row.check == run.check and row.verdict == "ok" for row in rows):
                shutil.rmtree(driver.work / run.name)
        print(f"also in {driver.output_dir}/verify.md and verify.json; logs: {driver.work}/logs")
        return exit_status(rows)
