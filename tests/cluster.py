"""A real Slurm on this machine: one slurmctld and four slurmd, each of which takes itself for a node with 16 cores and 8 GPUs.

A test module that says `pytest_plugins = ["tests.cluster"]` has the fixture `slurm`; all modules of a session share one cluster. Needs
Debian's slurm-wlm (run_tests.sh installs it) and a kernel that gives namespaces, to root or to users; no munge, no systemd. A node is a
namespace of its own for names and processes: `hostname` says node1 to node4, these names resolve on the nodes, and killing the namespace
is a power failure. The GPUs exist for the scheduler only: it counts them and sets CUDA_VISIBLE_DEVICES.
"""

import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from megatron_jobs.launch import held_port

NODES = [f"node{number}" for number in range(1, 5)]
PATH = f"{os.environ['PATH']}:/usr/sbin"  # which Debian leaves out of a user's PATH
GRACE_SECONDS = 20  # that a job of partition main has left when one of partition urgent needs its nodes
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

SLURM_CONF = """\
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={control_port}
FirstJobId={control_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
KillWait=3
MinJobAge=600
SlurmdTimeout=120
MessageTimeout=60
SchedulerParameters=bf_interval=2,batch_sched_delay=0,sched_min_interval=0
{nodes}
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=10 GraceTime={grace} PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefMemPerCPU=10 PriorityTier=2
"""
NODE = "NodeName={name} NodeHostname=localhost NodeAddr={address} Port={port} CPUs={cpus} RealMemory=100000 Gres=gpu:h100:8"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Cluster"]:
    if shutil.which("slurmctld", path=PATH) is None:
        # A suite that skips where it was meant to have Slurm would hide that it was not installed.
        give_up = pytest.fail if os.environ.get("MUJINA_NEEDS_SLURM") else pytest.skip
        give_up("Slurm is not installed: apt-get install slurm-wlm")
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(scope="session")
def slurm(cluster: "Cluster") -> dict[str, str]:
    """The environment variables with which sbatch, squeue and scontrol reach the cluster."""
    return cluster.environment


class Cluster:
    """`environment` holds the variables of the clients."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.processes: dict[str, subprocess.Popen] = {}

    def start(self, name: str, command: list[str]) -> None:
        self.processes[name] = self._stack.enter_context(_process(self.folder, self.environment, name, command))

    def output(self, *command: str) -> str:
        return _output(self.environment, *command)

    def power_off(self, node: str) -> None:
        """All that runs on the node stands still at once, and is gone; Slurm is told, who would find out by itself minutes later.

        Told while the connections are silent, as they are when power fails: were they closed first, it would depend on how busy the
        machine is whether the job's other processes fail because of that before Slurm ends them.
        """
        for process in psutil.Process(self.processes[node].pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        self.output("scontrol", "update", f"nodename={node}", "state=down", "reason=power")
        self.processes[node].kill()
        self.processes[node].wait()

    def power_on(self, node: str) -> None:
        self.start(node, _node(node, self.folder))
        self.output("scontrol", "update", f"nodename={node}", "state=resume")
        wait_for(
            lambda: self.output("sinfo", "-h", "-p", "main", "-n", node, "-o", "%T").strip() == "idle", 300, f"{self.folder}/{node}.log"
        )


@contextmanager
def slurm_cluster(folder: Path, names: Sequence[str] = NODES, cpus: int = 16) -> Iterator[Cluster]:
    """Runs a cluster of nodes with these names, whose files are in `folder` (a short path: it holds Unix sockets).

    Its jobs are counted from the controller's port, for the number of a job chooses the port at which its ranks meet (slurm/supervisor.py):
    two clusters on one machine then have different ones.
    """
    with ExitStack() as stack:
        control_port, *ports = (stack.enter_context(held_port()) for _ in range(1 + len(names)))
        addresses = [f"127.0.0.{11 + number}" for number in range(len(names))]
        nodes = "\n".join(
            NODE.format(name=name, address=address, port=port, cpus=cpus)
            for name, address, port in zip(names, addresses, ports, strict=True)
        )
        conf = SLURM_CONF.format(folder=folder, user=getpass.getuser(), control_port=control_port, nodes=nodes, grace=GRACE_SECONDS)
        (folder / "slurm.conf").write_text(conf)
        (folder / "gres.conf").write_text(f"NodeName={','.join(names)} Name=gpu Type=h100 File={folder}/nvidia[0-7]\n")
        for number in range(8):
            (folder / f"nvidia{number}").symlink_to("/dev/null")  # any character device will do
        hosts = "\n".join(f"{address} {name}" for name, address in zip(names, addresses, strict=True))
        (folder / "hosts").write_text(f"{Path('/etc/hosts').read_text()}\n{hosts}\n")
        (folder / "state").mkdir()

        cluster = Cluster(folder, stack)
        cluster.start("slurmctld", ["slurmctld", "-D"])
        for name in names:
            cluster.start(name, _node(name, folder))

        def is_up() -> bool:
            logs = "".join(path.read_text() for path in sorted(folder.glob("*.log")))
            assert all(process.poll() is None for process in cluster.processes.values()), f"Slurm does not start here:\n{logs}"
            return cluster.output("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == ["idle"] * len(names)

        wait_for(is_up, 300, f"{folder}/*.log")
        yield cluster


def wait_for_job(environment: dict[str, str], job: str, timeout: float = 600) -> list[str]:
    """Waits for a job to end; returns its state, or those of all tasks of an array (COMPLETED, FAILED, …), in order."""

    def states() -> list[str]:
        return _output(environment, "squeue", "-h", "-r", "-t", "all", "-S", "i", "-j", job, "-o", "%T").split()

    wait_for(lambda: bool(states()) and ENDED.issuperset(states()), timeout, f"squeue -j {job}")
    return states()


def wait_for(condition: Callable[[], bool], timeout: float, explanation: str) -> None:
    """Waits until `condition()`; an AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not so after {timeout} seconds, see {explanation}"
        time.sleep(0.1)


def _node(name: str, folder: Path) -> list[str]:
    """The command of a slurmd in a namespace of its own. Without root it is root in there for as long as the mounting takes."""
    is_root = os.getuid() == 0
    become_root = [] if is_root else ["--map-root-user"]
    become_user = "" if is_root else f"unshare --map-user={os.getuid()} --map-group={os.getgid()}"
    start = f"mount --bind {folder}/hosts /etc/hosts && hostname {name} && {{ {become_user} slurmd -D -N {name} & wait; }}"
    return ["unshare", *become_root, "--mount", "--uts", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "sh", "-c", start]


@contextmanager
def _process(folder: Path, environment: dict[str, str], name: str, command: list[str]) -> Iterator[subprocess.Popen]:
    """Runs a command, its output in <name>.log, which ends with the block, or with this process, however it ends."""
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            env=os.environ | environment | {"PATH": PATH},
            stdout=log,
            stderr=log,
            start_new_session=True,  # an interrupt at the keyboard is the tests' to handle
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _output(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True).stdout
