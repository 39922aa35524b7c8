"""launch.sh: what it says and does, without installing anything.

Where a test needs an interpreter, it hands launch.sh a stand-in that makes an "environment" of one
script, answers pip's questions from environment variables, and writes down how pip was called.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = "manpages-zh iproute2 tmux chromium-headless-shell"

PYTHON_STAND_IN = f"""\
#!{sys.executable}
import json, os, shutil, sys
from pathlib import Path

arguments = sys.argv[1:]
if arguments[:2] == ["-m", "venv"]:
    folder = Path(arguments[-1])
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "pyvenv.cfg").touch()
    shutil.copy(__file__, folder / "bin" / "python")
elif arguments[:2] == ["-m", "pip"]:
    with open(os.environ["PIP_CALLS"], "a") as calls:
        calls.write(json.dumps(arguments[2:]) + "\\n")
    if any(os.environ.get("PIP_FAILS_ON", "nothing") in argument for argument in arguments):
        print(os.environ["PIP_SAYS"])
        sys.exit(1)
    if "--report" in arguments:
        report = Path(arguments[arguments.index("--report") + 1])
        metadata = json.loads(os.environ["TORCH_METADATA"])
        report.write_text(json.dumps({{"install": [{{"metadata": metadata}}]}}))
else:
    os.execv({sys.executable!r}, [{sys.executable!r}, *arguments])
"""
CPU_BUILD = '{"version": "2.13.0+cpu", "requires_dist": ["filelock"]}'
CUDA_BUILD = (
    '{"version": "2.13.0", "requires_dist": '
    '["filelock", "cuda-toolkit[cublas,cudart]==13.0.3; platform_system == \\"Linux\\""]}'
)


# What the caller chose, and what this very process was given (parallel/environment.py).
LEFT_OUT = ("PYTHON", "DS_ACCELERATOR")


class Machine:
    """A made-up machine: its own PATH entries, interpreter and environment folder."""

    def __init__(self, folder: Path) -> None:
        self.venv = folder / "venv"
        self.tools = folder / "tools"
        self.tools.mkdir()
        self.pip_calls = folder / "pip_calls"
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in LEFT_OUT},
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "MINI_LLM_VENV": str(self.venv),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # no GPU, even where the real machine has one
            "PIP_CALLS": str(self.pip_calls),
            "TORCH_METADATA": CPU_BUILD,
        }
        self.disk_free_gb(100)
        self.tool("dpkg-query", "printf installed")  # so that no test installs a package

    def tool(self, name: str, script: str, shell: str = "#!/bin/sh\n") -> Path:
        path = self.tools / name
        path.write_text(shell + script)
        path.chmod(0o755)
        return path

    def with_stand_in(self) -> "Machine":
        path = self.tool("stand-in", PYTHON_STAND_IN, shell="")
        self.environment["PYTHON"] = str(path)
        return self

    def with_environment(self) -> "Machine":
        """As after a set-up: the interpreter that runs this test, and an `accelerate`."""
        (self.venv / "bin").mkdir(parents=True)
        for name, script in (("python", f'exec {sys.executable} "$@"'), ("accelerate", "exit 9")):
            shutil.copy(self.tool(f"venv-{name}", script), self.venv / "bin" / name)
        return self

    def disk_free_gb(self, gigabytes: int) -> None:
        kilobytes = gigabytes * 1024 * 1024
        header = "Filesystem 1024-blocks Used Available Capacity Mounted"
        self.tool("df", f"echo '{header}'\necho '/dev/x 1 1 {kilobytes} 1% /'")

    def gpu(self, driver: str) -> None:
        self.tool("nvidia-smi", f"echo 'NVIDIA Test GPU, {driver}'")
        self.environment.pop("CUDA_VISIBLE_DEVICES", None)

    def launch(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(REPOSITORY / "launch.sh"), *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=600,  # pip and venv are at work in some of these
            check=False,
        )

    def installs(self) -> list[list[str]]:
        """The arguments of each call of pip, in order."""

        lines = self.pip_calls.read_text().splitlines() if self.pip_calls.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def assert_one_line(result: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """The run stopped with `code` and a single line on stderr that holds all of `parts`."""
    assert result.returncode == code, result.stdout + result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


# ------------------------------------------------------------------ the command line


def test_help_names_every_command(machine: Machine) -> None:
    result = machine.launch("help")
    assert result.returncode == 0
    commands = "setup quickstart test pretrain sft evaluate generate chat serve doctor"
    for command in commands.split():
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize("arguments", [["pretrian"], []])
def test_unknown_or_missing_command_lists_the_commands_in_one_line(
    machine: Machine, arguments: list[str]
) -> None:
    result = machine.launch(*arguments)
    commands = "setup quickstart test pretrain sft evaluate generate chat serve verify doctor"
    assert_one_line(result, 2, commands, *arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["setup", "--gpu"], "--gpu"),
        (["setup", "--torch_index"], "--torch_index"),
        (["quickstart", "--max_steps"], "--max_steps"),
        (["pretrain"], "./launch.sh setup"),  # nothing is installed in this environment
        (["evaluate"], "./launch.sh setup"),
        (["doctor"], "./launch.sh setup"),
    ],
)
def test_a_wrong_call_stops_with_one_line_that_names_the_flag(
    machine: Machine, arguments: list[str], named: str
) -> None:
    assert_one_line(machine.launch(*arguments), 2, f"{arguments[0]}: ", named)
    assert not machine.venv.exists()


def test_a_wrong_launch_flag_stops_with_one_line_that_names_it(machine: Machine) -> None:
    result = machine.with_environment().launch("sft", "--config_file", "absent.yaml")
    assert_one_line(result, 2, "launch.sh: sft: --config_file absent.yaml does not exist")


@pytest.mark.parametrize("recipe", ["pretrain", "sft"])
def test_print_shows_the_exact_command_with_recipe_flags_untouched_and_in_order(
    machine: Machine, recipe: str
) -> None:
    data = '{"web": {"path": "a b", "weight": 1}}'
    result = machine.with_environment().launch(
        *(recipe, "--max_steps=3", "--main_port", "29600", "--data", data, "--print"),
        *("--config_file=accelerate_configs/zero2.yaml", "--procs_per_node", "2"),
        *("--config", "my config.yaml", "--output_dir="),
    )
    assert result.returncode == 0, result.stderr
    assert shlex.split(result.stdout) == [
        "DS_ACCELERATOR=cpu",  # and OMP_NUM_THREADS, were it not set
        *(str(Path(sys.executable).with_name("accelerate")), "launch"),
        *("--config_file", "accelerate_configs/zero2.yaml", "--num_machines", "1"),
        *("--num_processes", "2", "--main_process_port", "29600"),
        *("--num_cpu_threads_per_process", "1"),
        *(f"recipes/{recipe}.py", "--max_steps=3", "--data", data),
        *("--config", "my config.yaml", "--output_dir="),
    ]


def test_pretrain_defaults_to_zero1_one_process_and_a_free_port_without_a_gpu(
    machine: Machine,
) -> None:
    words = shlex.split(machine.with_environment().launch("pretrain", "--print").stdout)
    assert words[3:11] == [
        *("--config_file", "accelerate_configs/zero1.yaml", "--num_machines", "1"),
        *("--num_processes", "1", "--main_process_port", "0"),
    ]
    assert words[-1] == "recipes/pretrain.py"


@pytest.mark.parametrize(
    ("cuda", "visible", "processes"),
    [("'13.0'", None, "2"), ("'13.0'", "1", "1"), ("None", None, "1")],
)
def test_pretrain_starts_one_process_per_gpu_that_torch_can_use(
    machine: Machine, cuda: str, visible: str | None, processes: str
) -> None:
    machine.gpu(driver="590.1")
    machine.tool("nvidia-smi", "echo 'GPU A, 590.1'\necho 'GPU B, 590.1'")
    torch = machine.tools / "packages/torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda}\n")
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    result = machine.with_environment().launch(
        "pretrain", "--print", PYTHONPATH=str(torch.parent), **environment
    )
    words = shlex.split(result.stdout)
    assert words[words.index("--num_processes") + 1] == processes
    assert ("CPU build" in result.stderr) == (cuda == "None")


@pytest.mark.parametrize(("gpus", "processes"), [(0, "2"), (1, "1"), (2, "2")])
def test_quickstart_trains_both_models_on_two_processes_but_on_one_with_one_gpu(
    machine: Machine, gpus: int, processes: str
) -> None:
    machine.with_environment()
    inputs = b"".join(
        (REPOSITORY / name).read_bytes() for name in ("pyproject.toml", "mini_llm/constraints.txt")
    )
    sum_ = subprocess.run(["cksum"], input=inputs, capture_output=True, check=True).stdout.decode()
    stamp = f"inputs={sum_.replace(' ', '').strip()}\nroot={REPOSITORY}\nvenv={machine.venv}\n"
    (machine.venv / ".mini_llm_setup").write_text(stamp)
    asked = machine.tool("python", f'[ "$3" = gpus ] && echo {gpus}\nexit 0')
    shutil.copy(asked, machine.venv / "bin/python")
    told = machine.tool("accelerate", 'echo "${DS_ACCELERATOR:-gpu} $*"')
    shutil.copy(told, machine.venv / "bin/accelerate")
    result = machine.launch("quickstart", OMP_NUM_THREADS="")
    assert result.returncode == 0, result.stderr
    runs = [line.split() for line in result.stdout.splitlines() if " launch " in line]
    assert [words[-1] for words in runs] == ["recipes/pretrain.py", "recipes/sft.py"]
    for words in runs:
        assert words[0] == ("gpu" if gpus else "cpu")
        assert words[words.index("--num_processes") + 1] == processes
        assert 1 <= int(words[words.index("--num_cpu_threads_per_process") + 1]) <= 4


# ------------------------------------------------------------------ set-up


def test_setup_installs_torch_first_and_everything_under_the_constraints(machine: Machine) -> None:
    result = machine.with_stand_in().launch("setup", "--dev")
    assert result.returncode == 0, result.stderr
    assert "No CUDA GPU found: installing torch 2.13.0+cpu (CPU build)" in result.stdout
    calls = machine.installs()
    for call in calls:
        assert call[call.index("-c") + 1] == "mini_llm/constraints.txt"
    real = [call for call in calls if "--dry-run" not in call]
    assert [call[-1] for call in real] == ["pip", "torch===2.13.0+cpu", ".[dev]"]


def test_setup_is_idempotent_and_a_second_call_installs_nothing(machine: Machine) -> None:
    machine.with_stand_in()
    assert machine.launch("setup").returncode == 0
    calls = machine.installs()
    again = machine.launch("setup")
    assert again.returncode == 0
    assert again.stdout.startswith("already set up: ")
    assert machine.installs() == calls


def test_setup_runs_again_for_dev_and_keeps_dev_from_then_on(machine: Machine) -> None:
    machine.with_stand_in()
    machine.launch("setup")
    assert "[setup] done" in machine.launch("setup", "--dev").stdout
    assert machine.installs()[-1][-1] == ".[dev]"
    assert machine.launch("setup").stdout.startswith("already set up: ")
    # An unfinished set-up leaves no stamp, so an environment made from other inputs is made again.
    stamp = machine.venv / ".mini_llm_setup"
    stamp.write_text(stamp.read_text().replace("inputs=", "inputs=0"))
    machine.launch("setup")
    assert machine.installs()[-1][-1] == ".[dev]"


def test_a_failed_setup_is_not_taken_for_a_finished_one(machine: Machine) -> None:
    machine.with_stand_in()
    missing = "ERROR: No matching distribution found for wandb>=0.20"
    failed = machine.launch("setup", PIP_FAILS_ON="--editable", PIP_SAYS=missing)
    assert_one_line(failed, 1, "package wandb>=0.20 cannot be had", "setup.log")
    assert "[setup] done" in machine.launch("setup").stdout


def test_a_package_that_does_not_build_is_named(machine: Machine) -> None:
    says = "ERROR: Failed to build 'deepspeed' when getting requirements to build wheel"
    result = machine.with_stand_in().launch("setup", PIP_FAILS_ON="--editable", PIP_SAYS=says)
    assert_one_line(result, 1, "package deepspeed could not be built", "setup.log")


def test_a_disk_that_fills_up_is_named(machine: Machine) -> None:
    says = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    result = machine.with_stand_in().launch("setup", PIP_FAILS_ON="torch===", PIP_SAYS=says)
    assert_one_line(result, 1, "disk filled up", "TMPDIR")


def test_real_pip_that_reaches_no_index_names_the_package_in_one_line(machine: Machine) -> None:
    result = machine.launch(
        "setup",
        PYTHON=sys.executable,
        PIP_CONFIG_FILE=os.devnull,
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(machine.tools),
    )
    assert_one_line(result, 1, "package pip", "cannot be had", str(machine.venv / "setup.log"))


def test_python_that_is_too_old_stops_with_one_line(machine: Machine) -> None:
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        machine.tool(name, "echo 3.9")
    assert_one_line(machine.launch("setup"), 1, "Python 3.11 or newer", "python3 (3.9)", "PYTHON=")
    assert not machine.venv.exists()


def test_python_without_venv_stops_with_one_line(machine: Machine) -> None:
    path = machine.tool("lame", 'case "$2" in *ensurepip*) exit 1 ;; *) echo 3.12 ;; esac')
    result = machine.launch("setup", PYTHON=str(path))
    assert_one_line(result, 1, "lame (3.12) has no venv or ensurepip", "python3-venv")


def test_python_that_does_not_exist_stops_with_one_line(machine: Machine) -> None:
    assert_one_line(machine.launch("setup", PYTHON="/no/python"), 1, "/no/python")


def test_short_disk_stops_before_anything_is_made(machine: Machine) -> None:
    machine.with_stand_in().disk_free_gb(1)
    assert_one_line(machine.launch("setup"), 1, "needs about 3 GB", "has 1 GB free")
    assert not machine.venv.exists()


def test_a_folder_that_is_no_environment_is_never_overwritten(machine: Machine) -> None:
    machine.venv.mkdir()
    (machine.venv / "thesis.tex").touch()
    result = machine.with_stand_in().launch("setup")
    assert_one_line(result, 1, str(machine.venv), "not a Python environment")
    assert (machine.venv / "thesis.tex").exists()


# ------------------------------------------------------------------ system packages of tests


def without_test_packages(machine: Machine, user: int) -> Path:
    """A machine of this user that lacks them; the file gets one line per call of apt-get."""
    calls = machine.tools / "apt_calls"
    machine.tool("dpkg-query", "exit 1")
    machine.tool("id", f"echo {user}")
    machine.tool("apt-get", f'echo "$@" >>{calls}\nexit "${{APT_STATUS:-0}}"')
    machine.with_stand_in()
    return calls


def test_setup_with_dev_installs_the_debian_packages_that_tests_need(machine: Machine) -> None:
    calls = without_test_packages(machine, user=0)
    assert machine.launch("setup").returncode == 0
    assert not calls.exists()  # nobody but a developer needs them
    assert machine.launch("setup", "--dev").returncode == 0
    assert calls.read_text() == f"install --yes --no-install-recommends {PACKAGES}\n"
    calls.unlink()
    assert machine.launch("setup", "--dev").stdout.startswith("already set up: ")
    assert calls.exists()  # they may be gone while the environment is still there


def test_setup_goes_on_and_says_so_without_the_rights_to_install_debian_packages(
    machine: Machine,
) -> None:
    calls = without_test_packages(machine, user=1000)
    result = machine.launch("setup", "--dev")
    assert result.returncode == 0
    assert f"to run them too: sudo apt-get install {PACKAGES}" in result.stderr
    assert not calls.exists()


def test_setup_goes_on_and_says_so_where_a_debian_package_cannot_be_had(machine: Machine) -> None:
    calls = without_test_packages(machine, user=0)
    result = machine.launch("setup", "--dev", APT_STATUS="100")
    assert result.returncode == 0
    assert result.stderr.count(" cannot be had (apt's output: ") == len(PACKAGES.split())
    first, second, *one_by_one = calls.read_text().splitlines()
    assert first.endswith(f" {PACKAGES}")
    assert second == "update"  # the lists may be old, or none there
    assert [call.split()[-1] for call in one_by_one] == PACKAGES.split()


# ------------------------------------------------------------------ which torch build


def test_cuda_build_on_a_machine_with_a_new_enough_driver(machine: Machine) -> None:
    machine.with_stand_in().gpu(driver="580.65.06")
    result = machine.launch("setup", TORCH_METADATA=CUDA_BUILD)
    assert result.returncode == 0, result.stderr
    expected = "Found NVIDIA Test GPU (driver 580.65.06): installing torch 2.13.0 (CUDA 13.0 build)"
    assert expected in result.stdout


def test_a_driver_too_old_for_the_cuda_build_stops_before_the_download(machine: Machine) -> None:
    machine.with_stand_in().gpu(driver="535.104.05")
    result = machine.launch("setup", TORCH_METADATA=CUDA_BUILD)
    assert_one_line(result, 1, "driver 535.104.05", "too old", "driver 580", "--torch_index")
    assert not [call for call in machine.installs() if "torch===2.13.0" in call]


def test_cuda_build_needs_more_disk_than_the_cpu_build(machine: Machine) -> None:
    machine.with_stand_in().gpu(driver="590.1")
    machine.disk_free_gb(5)
    result = machine.launch("setup", TORCH_METADATA=CUDA_BUILD)
    assert_one_line(result, 1, "needs about 10 GB", "has 5 GB free")


def test_cuda_build_without_a_gpu_says_how_to_save_the_disk(machine: Machine) -> None:
    result = machine.with_stand_in().launch("setup", TORCH_METADATA=CUDA_BUILD)
    assert result.returncode == 0
    assert "No CUDA GPU found, but pip's index offers only a CUDA build" in result.stdout
    assert "--torch_index" in result.stderr


def test_cpu_build_on_a_machine_with_a_gpu_is_said_aloud(machine: Machine) -> None:
    machine.with_stand_in().gpu(driver="590.1")
    result = machine.launch("setup")
    assert result.returncode == 0
    assert "offers only a CPU build" in result.stdout
    assert "--torch_index" in result.stderr


def test_torch_index_is_handed_to_pip_for_torch_alone(machine: Machine) -> None:
    machine.with_stand_in()
    index = "file:///some/index"
    cuda = '{"version": "2.13.0+cu126"}'
    machine.gpu(driver="535.104.05")
    result = machine.launch("setup", "--torch_index", index, TORCH_METADATA=cuda)
    assert result.returncode == 0, result.stderr
    assert "torch 2.13.0+cu126 (CUDA 12.6 build)" in result.stdout
    with_index = [call for call in machine.installs() if index in call]
    assert [call[-1] for call in with_index] == ["torch==2.13.0", "torch===2.13.0+cu126"]
    assert index not in (machine.venv / ".mini_llm_setup").read_text()  # it may hold a password
    # The same choice is done; another one is not.
    again = machine.launch("setup", f"--torch_index={index}", TORCH_METADATA=cuda)
    assert again.stdout.startswith("already set up: ")
    other = machine.launch("setup", "--torch_index=file:///other", TORCH_METADATA=cuda)
    assert "[setup] done" in other.stdout


def test_a_later_setup_keeps_the_torch_build_that_was_chosen(machine: Machine) -> None:
    machine.with_stand_in()
    assert machine.launch("setup", "--torch_index=file:///index").returncode == 0
    torch = machine.venv / "lib/python3.11/site-packages/torch"
    torch.mkdir(parents=True)
    (torch / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda = None\n")
    result = machine.launch("setup", "--dev", TORCH_METADATA=CUDA_BUILD)
    assert "Keeping the installed torch 2.13.0+cpu" in result.stdout
    assert "torch===2.13.0+cpu" in machine.installs()[-2]


# ------------------------------------------------------------------ the script itself


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert shellcheck is not None, "shellcheck is missing; run ./launch.sh setup --dev"
    scripts = ["launch.sh", ".ci/run", "examples/pretrain.sbatch"]
    result = subprocess.run(
        [shellcheck, *scripts], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


# ------------------------------------------------------------------ examples/pretrain.sbatch


@pytest.mark.parametrize(
    "flags",
    [
        ["--output_dir", "elsewhere"],
        ["--output_dir=elsewhere"],
        ["--stop_at_step", "5"],
        ["--print"],
    ],
)
def test_a_batch_job_that_would_be_requeued_for_ever_is_refused(
    machine: Machine, flags: list[str]
) -> None:
    machine.tool("srun", "echo srun ran\n")
    machine.tool("scontrol", "echo scontrol ran\n")
    result = subprocess.run(
        ["bash", "examples/pretrain.sbatch", *flags],
        cwd=REPOSITORY,
        env={**machine.environment, "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert flags[0].partition("=")[0] in result.stderr
