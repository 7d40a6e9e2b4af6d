"""A real SLURM for tests, on this machine, gone when they end; see slurm_cluster.sh."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def why_not() -> str:
    """Why there can be no cluster here; empty if there can."""
    if os.geteuid() != 0:
        return "SLURM's daemons and the namespaces of its nodes want root"
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        packages = "slurmctld slurmd slurm-client munge iproute2 util-linux"
        return f"{', '.join(missing)} not installed: apt-get install --no-install-recommends {packages}"
    tried = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True)
    return f"no namespaces for the nodes: {tried.stderr.strip()}" if tried.returncode else ""


class SlurmCluster:
    """Nodes n1..nN with the partitions `train` (default) and `urgent`, which preempts it.

    Args:
        folder: for configuration, state and logs.
        num_nodes: how many.
        settings: variables of slurm_cluster.sh: CPUS a node, GRACE_TIME at preemption, KILL_WAIT after SIGTERM.
    """

    def __init__(self, folder: Path, num_nodes: int, **settings: int) -> None:
        self._folder = folder
        variables = {name: str(value) for name, value in settings.items()}
        script = str(ROOT / "tests/helpers/slurm_cluster.sh")
        # `cat` ends, and the cluster with it, when this process does, in whatever way.
        self._process = subprocess.Popen(
            ["bash", script, str(num_nodes), str(folder), "bash", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | variables, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise AssertionError(f"the cluster did not come up; see above and {folder}/log")
        (self._first,) = psutil.Process(self._process.pid).children()

    def close(self) -> None:
        """Take the cluster down, all its processes included."""
        self._process.kill()
        self._process.communicate()
        psutil.wait_procs([self._first], timeout=30)

    def run(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        """What a command prints that runs in the controller's network, in the repository's root."""
        return subprocess.run(
            ["nsenter", f"--net=/proc/{self._first.pid}/ns/net", *command],
            cwd=ROOT, env=os.environ | {"SLURM_CONF": str(self._folder / "slurm.conf")} | dict(env or {}),
            check=True, stdout=subprocess.PIPE, text=True, timeout=60,
        ).stdout  # fmt: skip

    def submit(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """`sbatch`; returns the job's number. The job has our environment, and `env`."""
        return self.run("sbatch", "--parsable", *arguments, env=env).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` tells: JobState, Restarts, NodeList, ..."""
        told = self.run("scontrol", "show", "job", "--oneliner", number)
        return dict(field.split("=", 1) for field in told.split() if "=" in field)

    def wait_for(self, number: str, *states: str, timeout_s: float = 300) -> dict[str, str]:
        """The job, once it is in one of the states."""
        until(lambda: self.job(number)["JobState"] in states, f"job {number} to be {states}", timeout_s=timeout_s)
        return self.job(number)

    def processes(self, *words: str) -> list[psutil.Process]:
        """Processes on the nodes whose command line has all the words."""
        family = self._first.children(recursive=True)
        return [process for process in family if all(word in _command(process) for word in words)]

    def pull_plug(self, node: str) -> None:
        """End a node and everything on it, at once."""
        (machine,) = self.processes("unshare", f"hostname {node};")
        machine.kill()


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def until(condition: Callable[[], Any], what: str, *, timeout_s: float = 300) -> Any:
    """Wait for a condition and return what it gives."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.1)
    return result
