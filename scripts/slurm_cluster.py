"""A real SLURM of two nodes on this machine, in a folder of its own: for tests, and to try `ov2 submit` on a laptop.

    python scripts/slurm_cluster.py bash          # a shell inside; or any other command; stopped when it ends

Needs root (device files for the fake GPUs, names in /etc/hosts) and the packages of scripts/setup_debian.sh. A SLURM
that the machine may have of its own is not touched: SLURM_CONF leads every command to this one.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("slnode1", "slnode2")
CPUS, GPUS = 4, 2  # of each node, independent of the machine
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol")
SYSTEM_FOLDERS = "/usr/sbin:/sbin"
HOSTS = Path("/etc/hosts")

# Values that are not SLURM's defaults, each for a reason:
#   cred_expire=5         a requeued job starts after 7 s and not after 122 (3 is refused)
#   config_overrides      a node has the CPUs that are written here
#   PriorityTier, GraceTime, preempt_send_user_signal    a job in `urgent` preempts one in `main`: USR2 and TERM first
#   SlurmdTimeout=6       a lost node is noticed within seconds
#   task/none, linuxproc  no cgroups, no systemd
CONF = """\
ClusterName=ov2
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=5
SlurmdTimeout=6
SlurmctldTimeout=30
InactiveLimit=0
MailProg=/bin/true
MpiDefault=none
GresTypes=gpu
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=slnode1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus}
NodeName=slnode2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 GraceTime=20 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF State=UP
"""


def missing() -> str | None:
    """Why no cluster can run here, in one line; None if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"no {', '.join(absent)} here (bash scripts/setup_debian.sh installs them)"
    if os.getuid() != 0:
        return "a private SLURM needs root (device files, /etc/hosts)"
    return None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:{SYSTEM_FOLDERS}"


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, poll_s: float = 0.2) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(poll_s)


class Cluster:
    """Started when entered; SLURM_CONF and PATH are set in this process while it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment: dict[str, str | None] = {}
        self._host_line = f"127.0.0.1 {' '.join(NODES)}  # {folder}\n"  # of this cluster, if there are several

    def __enter__(self) -> Cluster:
        for name in ("state", "dev", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write_config()
        self._set_environment(SLURM_CONF=str(self.folder / "slurm.conf"), PATH=_path())
        with HOSTS.open("a") as file:
            file.write(self._host_line)
        try:
            self._run("slurmctld", "-c")
            for node in NODES:
                self.start_node(node)
            self.wait_idle(60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._run("scancel", "--full", "--signal=KILL", "--user=root")
            self._run("scancel", "--user=root")
            wait_until(lambda: not self.queue(), 20, "an empty queue")
        except (subprocess.CalledProcessError, TimeoutError) as error:
            print(f"slurm_cluster: {error}; see {self.folder}", file=sys.stderr)
        for name in ("slurmctld", *(f"slurmd.{node}" for node in NODES)):
            self._end(name)
        HOSTS.write_text(HOSTS.read_text().replace(self._host_line, ""))
        self._set_environment(**self._environment)

    def _write_config(self) -> None:
        for index in range(GPUS):
            device = self.folder / "dev" / f"gpu{index}"
            if not device.exists():
                os.mknod(device, 0o20666, os.makedev(1, 3))  # /dev/null's numbers
        config = CONF.format(
            host=socket.gethostname().split(".")[0], folder=self.folder, ports=_free_ports(3), cpus=CPUS, gpus=GPUS
        )
        (self.folder / "slurm.conf").write_text(config)
        gres = f"NodeName=slnode[1-2] Name=gpu File={self.folder}/dev/gpu[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gres)

    def _set_environment(self, **values: str | None) -> None:
        for name, value in values.items():
            self._environment.setdefault(name, os.environ.get(name))
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _run(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def start_node(self, node: str) -> None:
        self._run("slurmd", "-N", node)

    def kill_node_daemon(self, node: str) -> None:
        """As if the node had lost its slurmd: SIGKILL, no good-bye."""
        os.kill(int((self.folder / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)

    def _end(self, name: str) -> None:
        try:
            number = int((self.folder / f"{name}.pid").read_text())
            os.kill(number, signal.SIGTERM)
            wait_until(lambda: not Path(f"/proc/{number}").exists(), 10, f"{name} to end")
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return
        except TimeoutError:
            os.kill(number, signal.SIGKILL)

    def wait_idle(self, timeout_s: float) -> None:
        def idle() -> bool:
            return set(self._run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) == set(NODES)

        wait_until(idle, timeout_s, f"both nodes to be idle (logs in {self.folder})")

    def queue(self) -> list[tuple[str, str]]:
        """(job id, state) of all jobs that are not done; one row for each member of an array."""
        rows = self._run("squeue", "-h", "-r", "-t", "all", "-o", "%i %T").splitlines()
        ended = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")
        return [(name, state) for name, state in map(str.split, rows) if state not in ended]


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def main() -> int:
    why = missing()
    if why is not None:
        print(f"slurm_cluster: {why}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="ov2-slurm-") as folder, Cluster(Path(folder)):
        return subprocess.run(sys.argv[1:] or ["bash"]).returncode


if __name__ == "__main__":
    sys.exit(main())
