"""mini_llm/launch: which node this is, by flags, SLURM or hostfile, and the command it runs."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mini_llm.command_line import UsageError
from mini_llm.launch import command as command_module
from mini_llm.launch import devices, network, nodes
from mini_llm.launch.__main__ import main
from mini_llm.launch.command import REPOSITORY, Launch, build_launch
from mini_llm.launch.fan_out import Host, host_commands, read_hostfile
from mini_llm.launch.nodes import Nodes, find_nodes
from mini_llm.launch.options import check_options, parse_options
from mini_llm.launch.rendezvous import Meeting, Registration

# What srun gave the second of two tasks on two nodes (what does not say who we are left out).
SRUN = {
    "SLURM_CLUSTER_NAME": "made-up",
    "SLURM_JOB_ID": "22902023",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_LAUNCH_NODE_IPADDR": "10.19.0.2",  # of the submit host, as a rule: not node 0
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_TASKS_PER_NODE": "1(x2)",
    "SLURM_TASK_PID": "25501",
}
# The batch script of the same job: one process, on the first node.
BATCH = {name: value for name, value in SRUN.items() if "STEP" not in name}
BATCH |= {"SLURM_NODEID": "0", "SLURM_PROCID": "0"}
SALLOC_SHELL = {
    **SRUN,
    **{"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"},
}


@pytest.fixture(autouse=True)
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for SLURM's, which knows one list of hosts."""
    stand_in(
        tmp_path,
        "scontrol",
        '[ "$*" = "show hostnames gpu[07-08]" ] || exit 1\nprintf "gpu07\\ngpu08\\n"',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def stand_in(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def found(*flags: str, environment: dict[str, str] | None = None) -> Nodes:
    options = parse_options("pretrain", list(flags))
    check_options(options)
    return find_nodes(options, environment or {}, processes=1)


# ------------------------------------------------------------------ by hand


def test_flags_by_hand_say_it_all_and_the_port_is_fixed() -> None:
    flags = ("--nodes", "4", "--node_rank", "3", "--main_ip", "10.0.0.1")
    assert found(*flags) == Nodes(4, 3, "10.0.0.1", 29500, "by hand")
    assert found(*flags, "--main_port=2000").main_port == 2000


def test_one_node_is_the_default_with_any_free_port() -> None:
    assert found() == found("--nodes", "1") == Nodes(1, 0, None, 0)
    assert found("--nodes", "1", "--node_rank", "0", "--main_ip", "10.0.0.1").count == 1


HAND = ("--nodes", "2", "--node_rank", "1", "--main_ip", "10.0.0.1")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--node_rank", "1"], "--node_rank needs --nodes N"),
        (["--nodes", "2", "--node_rank", "2"], "--node_rank 2 does not exist with --nodes 2"),
        (["--nodes", "2"], "add --node_rank R and --main_ip IP, or --rendezvous_file PATH"),
        (["--nodes", "2", "--node_rank", "0"], "needs --main_ip IP"),
        (["--main_ip", "10.0.0.1"], "--main_ip needs --nodes N and --node_rank R"),
        ([*HAND, "--main_port", "0"], "--main_port 0 (any free port) is for one node"),
        (["--rendezvous_file", "f"], "--rendezvous_file needs --nodes N"),
        ([*HAND, "--rendezvous_file", "f"], "--rendezvous_file and --node_rank are two ways"),
        (["--nodes", "2", "--hostfile", "f"], "--hostfile and --nodes are two ways"),
        (["--rendezvous_file", "f", "--hostfile", "g"], "--hostfile and --rendezvous_file are two"),
        (["--nodes", "2", "--rendezvous_file", "f", "--print"], "--print cannot show"),
        (["--env", "HF_HOME"], "--env is for --hostfile"),
        (["--config_file", "absent.yaml"], "--config_file absent.yaml does not exist"),
        (["--config_file"], "--config_file needs a value"),
        (["--hostfile="], "--hostfile needs a value"),
        (["--procs_per_node", "two"], "--procs_per_node must be a whole number of at least 1"),
        (["--procs_per_node", "0"], "--procs_per_node must be"),
        (["--nodes", "-2"], "--nodes must be"),
        (["--main_port=http"], "--main_port must be a whole number from 0 to 65535, got 'http'"),
        (["--main_port=65536"], "--main_port must be"),
        (["--max_restarts", "1.5"], "--max_restarts must be"),
        (["--main_port", "65530", "--max_restarts", "6"], "--main_port 65530 with --max_restarts"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line_with_status_2(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", *flags]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("launch.sh: pretrain: ") and sentence in said.err
    assert len(said.err.splitlines()) == 1 and not said.out


def test_an_address_of_another_machine_is_refused_on_node_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--nodes", "2", "--main_ip", "203.0.113.9", "--network_interface", "lo"]
    assert main(["sft", *flags, "--node_rank", "0", "--print"]) == 2
    assert "--main_ip 203.0.113.9 is not an address of this machine" in capsys.readouterr().err
    assert main(["sft", *flags, "--node_rank", "1", "--print"]) == 0


def test_a_name_that_nobody_knows_and_an_interface_that_is_not_there_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--nodes", "2", "--node_rank", "1", "--main_ip"]
    assert main(["sft", *flags, "no-such-host.invalid"]) == 2
    assert "--main_ip no-such-host.invalid cannot be reached" in capsys.readouterr().err
    assert main(["sft", *flags, "10.0..1"]) == 2
    assert "--main_ip 10.0..1 cannot be reached" in capsys.readouterr().err
    assert main(["sft", *flags, "127.0.0.1", "--network_interface", "eth99"]) == 2
    assert (
        "--network_interface or GLOO_SOCKET_IFNAME eth99 does not exist here"
        in capsys.readouterr().err
    )


def test_a_port_that_another_process_has_is_refused_on_node_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        flags = ["--nodes", "2", "--node_rank", "0", "--main_ip", "127.0.0.1", "--main_port", port]
        assert main(["pretrain", *flags]) == 2
    assert f"--main_port {port} cannot be used on this machine" in capsys.readouterr().err


# ------------------------------------------------------------------ SLURM


def test_a_task_of_srun_finds_its_place_in_slurms_environment() -> None:
    nodes = found(environment=SRUN)
    assert (nodes.count, nodes.rank, nodes.main_ip) == (2, 1, "gpu07")
    assert nodes.found_by == "by SLURM, job 22902023"
    assert nodes.main_port == 10_000 + 23 * 20
    other = found(environment={**SRUN, "SLURM_JOB_ID": "22902024"})
    assert other.main_port - nodes.main_port == 20  # the restarts of one do not reach the other


def test_flags_override_what_slurm_says_of_the_main_address() -> None:
    nodes = found("--main_ip", "10.0.0.7", "--main_port", "4000", environment=SRUN)
    assert nodes == Nodes(2, 1, "10.0.0.7", 4000, "by SLURM, job 22902023")
    assert found(*HAND, environment=SRUN) == found(*HAND)


def test_slurm_on_one_node_is_one_node() -> None:
    one = {"SLURM_JOB_NUM_NODES": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}
    assert found(environment={**SRUN, **one}) == Nodes()
    assert found(environment={**BATCH, "SLURM_JOB_NUM_NODES": "1"}) == Nodes()


@pytest.mark.parametrize(
    ("flags", "environment", "sentence"),
    [
        ([], {**SRUN, "SLURM_STEP_NUM_TASKS": "16"}, "add --ntasks-per-node=1 to srun"),
        (["--nodes", "3"], SRUN, "--nodes 3 contradicts SLURM, which runs this on 2 node(s)"),
        ([], BATCH, "has 2 nodes, but only srun starts something on each"),
        ([], SALLOC_SHELL, "has 2 nodes, but only srun starts something on each"),
        ([], {**SRUN, "SLURM_STEP_NODELIST": "other[1-2]"}, "give it with --main_ip IP"),
        ([], {**SRUN, "SLURM_NODEID": ""}, "has no number in SLURM_NODEID"),
    ],
)
def test_what_slurm_cannot_mean_is_refused(
    flags: list[str], environment: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UsageError) as refused:
        found(*flags, environment=environment)
    assert sentence in str(refused.value)


def test_one_node_of_a_batch_job_can_be_asked_for() -> None:
    assert found("--nodes", "1", environment=BATCH) == Nodes()


def test_only_a_batch_system_tells_jobs_apart() -> None:
    assert nodes.job_key({}) == "job"
    assert nodes.job_key({"PBS_JOBID": "12.host"}) == "12_host_0"
    requeued = {**SRUN, "SLURM_RESTART_COUNT": "2"}
    assert nodes.job_key(SRUN) != nodes.job_key(requeued) == "22902023_2"


# ------------------------------------------------------------------ the command


def launch_of(*flags: str, environment: dict[str, str] | None = None, processes: int = 8) -> Launch:
    options = parse_options("pretrain", list(flags))
    check_options(options)
    return build_launch(options, found(*flags), processes, environment or {})


LOOPBACK = ("--nodes", "3", "--node_rank", "1", "--main_ip", "127.0.0.1")


def test_a_node_of_several_starts_accelerate_with_the_standard_launcher() -> None:
    flags = ("--config_file", "accelerate_configs/zero2.yaml", "--rendezvous_timeout", "77")
    ready = launch_of(*LOOPBACK, *flags, "--max_steps", "5", "--data", '{"a b": 1}')
    words = ready.command()
    assert words == [
        *(str(Path(sys.executable).with_name("accelerate")), "launch"),
        *("--config_file", "accelerate_configs/zero2.yaml"),
        *("--num_machines", "3", "--num_processes", "24", "--main_process_port", "29500"),
        *("--main_process_ip", "127.0.0.1", "--machine_rank", "1"),
        *("--deepspeed_multinode_launcher", "standard", "--rdzv_conf", "timeout=77"),
        *("--num_cpu_threads_per_process", str(ready.threads)),
        *("recipes/pretrain.py", "--max_steps", "5", "--data", '{"a b": 1}'),
    ]


@pytest.mark.parametrize("config", ["zero2", "multi_node"])
def test_accelerate_hands_torchrun_the_nodes_and_the_meeting_point(config: str) -> None:
    """A config of one machine and the command line: what Accelerate makes of them together."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    ready = launch_of(*LOOPBACK, "--config_file", f"accelerate_configs/{config}.yaml")
    args = launch_command_parser().parse_args(ready.command()[2:])
    args, defaults, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    words, _ = prepare_deepspeed_cmd_env(args)
    assert words is None  # else it would start deepspeed's own launcher, with pdsh
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("3", "8", 1)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "127.0.0.1:29500")
    assert (args.rdzv_conf, args.max_restarts) == ("timeout=900", 0)


def test_each_restart_takes_the_next_port_unless_the_port_is_any() -> None:
    ready, single = launch_of(*LOOPBACK), launch_of()
    for attempt in (0, 1, 2):
        words = ready.command(attempt)
        assert words[words.index("--main_process_port") + 1] == str(29500 + attempt)
        assert single.command(attempt) == single.command()
    last = launch_of("--main_port", "65530", "--max_restarts", "5").command(5)
    assert last[last.index("--main_process_port") + 1] == "65535"


def test_the_interface_is_the_one_towards_node_0_unless_a_flag_or_a_variable_names_one() -> None:
    loopback = network.own_addresses()["127.0.0.1"]
    assert launch_of(*LOOPBACK).variables["GLOO_SOCKET_IFNAME"] == loopback
    assert launch_of(*LOOPBACK).variables["NCCL_SOCKET_IFNAME"] == loopback
    assert "GLOO_SOCKET_IFNAME" not in launch_of().variables
    environment = {"NCCL_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cpu"}
    ready = launch_of(*LOOPBACK, environment=environment)
    assert ready.variables == {"GLOO_SOCKET_IFNAME": loopback}
    assert "found set  NCCL_SOCKET_IFNAME=ib0" in ready.start_block(environment)


@pytest.mark.parametrize("names", ["lo,eth99", "lo"])
def test_the_first_interface_that_gloo_is_told_of_has_the_address_for_the_other_nodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: str
) -> None:
    def meet(path: str, mine: Registration, job: str, seconds: float) -> Meeting:
        return Meeting(0, [mine, mine])

    monkeypatch.setattr(nodes, "meet", meet)
    flags = ("--nodes", "2", "--rendezvous_file", str(tmp_path / "meet"))
    environment = {"GLOO_SOCKET_IFNAME": names}
    assert found(*flags, environment=environment).main_ip == "127.0.0.1"


def test_a_variable_that_is_set_to_nothing_is_settled_as_one_that_is_not_set() -> None:
    ready = launch_of(*LOOPBACK, environment={"GLOO_SOCKET_IFNAME": "", "DS_ACCELERATOR": ""})
    assert ready.variables["GLOO_SOCKET_IFNAME"] == "lo"
    assert ready.variables["DS_ACCELERATOR"] == "cpu"


def test_a_node_that_knows_itself_by_a_loopback_address_takes_the_interface_others_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As Debian's installer writes it: the machine's own name is 127.0.1.1.
    monkeypatch.setattr(network, "resolve", lambda host: "127.0.1.1")
    monkeypatch.setattr(network, "own_address", lambda interface: "10.0.0.5")
    monkeypatch.setattr(network, "own_addresses", lambda: {"127.0.0.1": "lo", "10.0.0.5": "eth7"})
    assert network.interface_towards("gpu07") == "eth7"


def without_a_default_route(monkeypatch: pytest.MonkeyPatch, **addresses: str) -> None:
    def no_route(address: str) -> str:
        raise OSError(101, "Network is unreachable")

    up = SimpleNamespace(isup=True)
    found = {address: name for name, address in addresses.items()} | {"127.0.0.1": "lo"}
    monkeypatch.setattr(network, "address_towards", no_route)
    monkeypatch.setattr(network, "own_addresses", lambda: found)
    monkeypatch.setattr(network.psutil, "net_if_stats", lambda: dict.fromkeys(found.values(), up))


def test_without_a_default_route_the_only_network_is_the_one_to_the_other_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_a_default_route(monkeypatch, ib0="10.1.0.5")
    assert network.own_address(None) == "10.1.0.5"


def test_several_networks_without_a_default_route_need_the_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_a_default_route(monkeypatch, ib0="10.1.0.5", eth0="10.2.0.5")
    with pytest.raises(UsageError, match=r"eth0 \(10.2.0.5\), ib0 \(10.1.0.5\); name the one"):
        network.own_address(None)
    assert network.own_address("ib0") == "10.1.0.5"


def test_the_start_block_names_place_meeting_point_variables_and_time_outs() -> None:
    block = launch_of(*LOOPBACK, "--max_restarts", "2", processes=2).start_block({})
    assert f"node  1 of 3 ({network.host_name()}), by hand; rank 2 to 3 of 6" in block
    assert "node 0 at 127.0.0.1, port 29500" in block
    assert "GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo" in block
    assert "900 s for the other nodes" in block and "--ddp_timeout" in block
    assert "2 after a failure (--max_restarts), each on the next port" in block


def test_the_printed_line_runs_in_a_shell_as_it_stands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(tmp_path, "accelerate", 'echo "$GLOO_SOCKET_IFNAME" && for w; do echo "$w"; done')
    monkeypatch.setattr(command_module.sys, "executable", str(tmp_path / "python"))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert main(["pretrain", *LOOPBACK, "--data", "{'a b': $1}", "--print"]) == 0
    line = capsys.readouterr().out
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:2] == ["lo", "launch"]
    assert done.stdout.splitlines()[-1] == "{'a b': $1}"


def test_the_launcher_imports_no_torch() -> None:
    code = "import sys, mini_llm.launch.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# ------------------------------------------------------------------ hostfile


def hostfile(folder: Path, text: str) -> str:
    (folder / "hosts").write_text(text)
    return str(folder / "hosts")


def test_a_hostfile_is_read_as_deepspeed_does(tmp_path: Path) -> None:
    text = "# the rack\n\ngpu07 slots=8\nme@gpu08   slots=8 # new\n"
    assert read_hostfile(hostfile(tmp_path, text)) == [Host("gpu07", 8), Host("me@gpu08", 8)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names no host"),
        ("a slots=8\na slots=8\n", "line 2: a is there already"),
        ("a\n", "line 1: 'a' is not of the form 'host slots=8'"),
        ("a slots=0\n", "is not of the form"),
        ("a slots=many\n", "is not of the form"),
        ("a slots=8 b\n", "is not of the form"),
        ("-oProxyCommand=x slots=8\n", "is not of the form"),
        ("node[1-2] slots=2\n", "is not of the form"),
        ("b slots=8\nme@localhost slots=8\n", "me@localhost means another machine on each of"),
        ("127.0.0.1 slots=8\nb slots=8\n", "127.0.0.1 means another machine on each of the 2"),
    ],
)
def test_a_bad_line_of_a_hostfile_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_hostfile(hostfile(tmp_path, text))
    assert sentence in str(refused.value) and "--hostfile" in str(refused.value)


def test_a_hostfile_of_one_host_may_be_this_machine(tmp_path: Path) -> None:
    assert read_hostfile(hostfile(tmp_path, "localhost slots=2\n")) == [Host("localhost", 2)]


def test_a_hostfile_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xff\xfea slots=8\n")
    with pytest.raises(UsageError, match=r"--hostfile .*hosts cannot be read \(no UTF-8\)"):
        read_hostfile(str(tmp_path / "hosts"))


def test_a_hostfile_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--hostfile", "/no/hosts"]) == 2
    assert "--hostfile /no/hosts cannot be read (No such file" in capsys.readouterr().err


def commands(*flags: str, hosts: list[Host], environment: dict[str, str]) -> dict[str, list[str]]:
    return host_commands(parse_options("pretrain", list(flags)), hosts, environment, REPOSITORY)


TWO = [Host("gpu07", 4), Host("me@gpu08", 4)]


def test_each_host_gets_its_rank_the_slots_and_a_short_part_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, "ssh", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    environment = {"NCCL_DEBUG": "INFO", "HF_TOKEN": "secret", "MY_OWN": "a b", "LANG": "C"}
    flags = ("--env", "MY_OWN", "--max_restarts", "2", "--max_steps", "5", "--data", '{"a b": 1}')
    made = commands(*flags, hosts=TWO, environment=environment)
    assert list(made) == ["gpu07", "me@gpu08"]
    for rank, (host, words) in enumerate(made.items()):
        assert words[0] == "ssh" and words[-2] == host
        assert "secret" not in words[-1] and "LANG" not in words[-1]
        # What the login shell makes of it, and then /bin/sh.
        script = shlex.split(words[-1])[-1]
        last = script.partition(" && ")[2]
        assert shlex.split(last) == [
            *("NCCL_DEBUG=INFO", "MY_OWN=a b", "exec", "./launch.sh", "pretrain"),
            *("--config_file", "accelerate_configs/zero1.yaml", "--procs_per_node", "4"),
            *("--nodes", "2", "--node_rank", str(rank), "--main_ip", "gpu07"),
            *("--main_port", "29500", "--max_restarts", "2", "--rendezvous_timeout", "900"),
            *("--max_steps", "5", "--data", '{"a b": 1}'),
        ]


def test_a_host_without_the_project_says_so_and_ends_with_status_2() -> None:
    options = parse_options("pretrain", [])
    made = host_commands(options, TWO, {}, Path("/no/such/project of mine"))
    line = made["gpu07"][-1]
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert done.returncode == 2
    assert "gpu07 has no /no/such/project of mine/launch.sh; the project must lie" in done.stderr


def test_pdsh_is_taken_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ssh", "pdsh"):
        stand_in(tmp_path, name, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PDSH_RCMD_TYPE", raising=False)
    words = commands(hosts=TWO, environment={})["gpu07"]
    assert words[:-1] == ["pdsh", "-S", "-N", "-R", "ssh", "-w", "gpu07"]


@pytest.mark.parametrize(
    ("flags", "hosts", "sentence"),
    [
        ([], [Host("a", 4), Host("b", 8)], "a has slots=4 but b slots=8"),
        (["--procs_per_node", "8"], [Host("a", 8), Host("b", 4)], "more than the slots=4 of b"),
        (["--env", "NOT_SET"], TWO, "--env NOT_SET: that variable is not set here"),
    ],
)
def test_hosts_that_do_not_fit_are_refused(
    flags: list[str], hosts: list[Host], sentence: str
) -> None:
    with pytest.raises(UsageError) as refused:
        commands(*flags, hosts=hosts, environment={})
    assert sentence in str(refused.value)


def test_without_pdsh_and_ssh_the_way_by_hand_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="needs pdsh or ssh"):
        commands(hosts=TWO, environment={})


@pytest.mark.parametrize("chosen", ["0", "²", "many", "-1"])
def test_a_number_of_threads_that_is_none_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert devices.threads_per_process(1) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    assert devices.threads_per_process(10_000) == 1


@pytest.mark.parametrize(("visible", "count"), [("0", 1), ("0,1,", 2), ("2, 3", 2), ("", 0)])
def test_processes_are_as_many_as_the_visible_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: str, count: int
) -> None:
    monkeypatch.setattr(devices, "ask_driver", lambda *_: ["a GPU"] * 8)
    monkeypatch.setattr(devices, "torch_build", lambda kind: "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.gpu_count() == count
