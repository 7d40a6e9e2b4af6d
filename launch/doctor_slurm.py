"""Are the lines that a cluster's site must change in slurm/ right? `python -m launch.doctor --slurm [CONFIG ...]`."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from launch.doctor import Finding, Findings

SCRIPT = Path("slurm/train.sh")
LOCAL_DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay")
NUMBERS = ("PROCS_PER_NODE", "OMP_NUM_THREADS", "PET_SHUTDOWN_TIMEOUT", "MAX_REQUEUES", "MAX_FAILURES")
"""Variables of slurm/env.sh that scripts count with."""


class Partition(NamedTuple):
    """What `sinfo` tells."""

    name: str
    is_default: bool
    limit_s: float
    gpus_per_node: int
    nodes: int


def check_slurm(runs: Path, configs: list[Path]) -> Findings:
    """SLURM itself, the claims of slurm/train.sh on it, the environment, and where runs are written.

    Args:
        runs: folder of runs.
        configs: runs to compare the claimed GPUs with.
    """
    if not SCRIPT.is_file():
        yield Finding("FAIL", str(SCRIPT), "not here", "cd to the repository's root")
        return
    yield from check_environment()
    yield from check_shared(runs)
    if shutil.which("sbatch") is None:
        yield Finding("FAIL", "sbatch", "not on PATH", "try this on a login node of the cluster; `module load slurm`?")
        return
    claims = read_claims(SCRIPT.read_text())
    settings = _settings()
    yield Finding("ok", "sbatch", f"SLURM {settings.get('SLURM_VERSION', '?')}, cluster {settings.get('ClusterName')}")
    yield from check_partition(claims, _partitions(), configs)
    yield from check_account(claims, settings)
    yield from check_signals(claims, settings)


def read_claims(script: str) -> dict[str, str]:
    """Options of the #SBATCH lines, over which the variables SBATCH_* go as they do for sbatch."""
    claims = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", script, flags=re.MULTILINE))
    variables = {
        "partition": "SBATCH_PARTITION", "account": "SBATCH_ACCOUNT", "time": "SBATCH_TIMELIMIT",
        "gpus-per-node": "SBATCH_GPUS_PER_NODE", "signal": "SBATCH_SIGNAL",
    }  # fmt: skip
    return claims | {option: os.environ[name] for option, name in variables.items() if os.environ.get(name)}


def check_partition(claims: dict[str, str], partitions: list[Partition], configs: list[Path]) -> Findings:
    """Whether the partition is there, and has the time, nodes and GPUs that are claimed."""
    names = ", ".join(partition.name for partition in partitions)
    wanted = claims.get("partition")
    found = [each for each in partitions if (each.name == wanted if wanted else each.is_default)]
    if not found:
        detail = f"{wanted!r} is not among {names}" if wanted else f"none is named and there is no default: {names}"
        yield Finding("FAIL", "partition", detail, f"set `#SBATCH --partition=` in {SCRIPT}")
        return
    partition = found[0]
    yield Finding("ok", "partition", f"{partition.name}, {partition.nodes} nodes of {partition.gpus_per_node} GPUs")
    time = claims.get("time", "0")  # none: the partition's default
    if seconds(time) > partition.limit_s:
        detail = f"{time} is above {partition.name}'s limit of {partition.limit_s / 3600:g} h"
        yield Finding("FAIL", "time", detail, "lower `#SBATCH --time=`; the job queues again by itself anyway")
    else:
        yield Finding("ok", "time", time)
    gpus, nodes = int(claims.get("gpus-per-node", "0").split(":")[-1]), int(claims.get("nodes", "1"))
    if gpus > partition.gpus_per_node:
        detail = f"{gpus} a node are claimed, and nodes of {partition.name} have {partition.gpus_per_node}"
        yield Finding("FAIL", "gpus", detail, "set `#SBATCH --gpus-per-node=` or another partition")
    elif partition.gpus_per_node and not gpus:
        detail = f"{partition.name} has {partition.gpus_per_node} a node and none is claimed: it would train on CPUs"
        yield Finding("warn", "gpus", detail, f"take a # from `##SBATCH --gpus-per-node=` in {SCRIPT}")
    else:
        yield Finding("ok", "gpus", f"{gpus} on each of {nodes} nodes")
    yield from check_batches(configs, world=nodes * max(gpus, 1))


def check_batches(configs: list[Path], *, world: int) -> Findings:
    """Whether each run's global batch can be shared by so many ranks."""
    from dist_train.config import load_run, plan_batch

    for path in configs:
        try:
            plan = plan_batch(load_run(path).optim, world)
        except ValueError as error:
            yield Finding("FAIL", str(path), str(error))
        else:
            yield Finding("ok", str(path), f"{plan.batch_per_rank} samples a pass on each of {world} ranks")


def check_account(claims: dict[str, str], settings: dict[str, str]) -> Findings:
    """Whether the account is one of the user's."""
    enforced = "associations" in settings.get("AccountingStorageEnforce", "")
    mine = _ask("sacctmgr", "-nP", "show", "assoc", f"user={_user()}", "format=account") if enforced else ""
    accounts = sorted(set(mine.split()))
    account = claims.get("account")
    if not enforced:
        yield Finding("ok", "account", "this cluster does not ask for one")
    elif account is None:
        detail = f"none is named, so the default one pays; yours are {', '.join(accounts) or 'none'}"
        yield Finding("warn" if accounts else "FAIL", "account", detail, f"set `#SBATCH --account=` in {SCRIPT}")
    elif account not in accounts:
        detail = f"{account!r} is not among yours: {', '.join(accounts) or 'none'}"
        yield Finding("FAIL", "account", detail, f"set `#SBATCH --account=` in {SCRIPT}")
    else:
        yield Finding("ok", "account", account)


def check_signals(claims: dict[str, str], settings: dict[str, str]) -> Findings:
    """Whether a job hears of its end early enough to save, and may queue again."""
    lead = re.fullmatch(r"B:(?:SIG)?USR1@(\d+)", claims.get("signal", ""))
    if not lead:
        detail = f"{claims.get('signal', 'none')}; the script waits for USR1 to the batch shell alone"
        yield Finding("FAIL", "signal", detail, "`#SBATCH --signal=B:USR1@300`")
    elif int(lead[1]) >= seconds(claims.get("time", "infinite")):
        yield Finding(
            "FAIL", "signal", f"{lead[1]} s before the end of {claims['time']}", "a shorter lead, or more time"
        )
    else:
        yield Finding("ok", "signal", f"USR1, {lead[1]} s before the end")
    if "requeue" not in claims:
        yield Finding("FAIL", "requeue", f"{SCRIPT} does not say --requeue", "add the line `#SBATCH --requeue`")
    parameters = settings.get("SlurmctldParameters", "") + settings.get("PreemptParameters", "")
    if settings.get("PreemptType", "none").endswith("none"):
        yield Finding("ok", "preemption", "none on this cluster")
    elif "send_user_signal" in parameters:
        yield Finding("ok", "preemption", "sends USR1")
    else:
        detail = f"sends SIGTERM alone: {settings.get('KillWait', '?')} and the partition's GraceTime are all there is"
        yield Finding("warn", "preemption", detail, "a checkpoint.every of some minutes; or ask for send_user_signal")


def check_environment() -> Findings:
    """slurm/env.sh: whether it can be sourced, finds Python and accelerate, and gives numbers where numbers belong."""
    program = "set -e; source slurm/env.sh; command -v python accelerate; env"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()[-1:]
        detail = f"fails, or finds no python or accelerate: {' '.join(said)}"
        yield Finding("FAIL", "slurm/env.sh", detail, "its first lines must lead to the environment")
        return
    variables = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    for name in NUMBERS:
        if not variables.get(name, "").isdigit():
            yield Finding("FAIL", name, f"{variables.get(name)!r} is not a number", "mend it in slurm/env.sh")
    yield Finding("ok", "slurm/env.sh", done.stdout.splitlines()[0])


def check_shared(runs: Path) -> Findings:
    """Whether the folder of runs, and this one, look like disks that all nodes see."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    for folder in dict.fromkeys([Path.cwd(), runs.absolute().resolve()]):
        kind = max((len(point), kind) for point, kind in mounts if folder.is_relative_to(point))[1]
        if kind in LOCAL_DISKS:
            mend = "if other nodes do not see it there, work on a shared disk, and set out= in the run"
            yield Finding("warn", str(folder), f"on {kind}, as a rule a disk of this machine alone", mend)
        else:
            yield Finding("ok", str(folder), f"on {kind}")


def seconds(time: str) -> float:
    """SLURM's ways to write a time: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S, infinite.

    Raises:
        ValueError: it is none of them.
    """
    if time.lower() in ("infinite", "unlimited"):
        return float("inf")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


def _partitions() -> list[Partition]:
    rows: dict[str, Partition] = {}
    for line in _ask("sinfo", "--noheader", "--format", "%P|%l|%G|%D").splitlines():
        name, limit, gres, nodes = line.split("|")
        gpus = sum(int(count) for count in re.findall(r"gpu:(?:[^:,(]+:)?(\d+)", gres))
        row = Partition(name.rstrip("*"), name.endswith("*"), seconds(limit), gpus, int(nodes))
        known = rows.get(row.name)  # a line for each kind of node
        rows[row.name] = row if known is None else row._replace(
            nodes=row.nodes + known.nodes, gpus_per_node=max(row.gpus_per_node, known.gpus_per_node)
        )  # fmt: skip
    return list(rows.values())


def _settings() -> dict[str, str]:
    pairs = (line.split("=", 1) for line in _ask("scontrol", "show", "config").splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _user() -> str:
    return os.environ.get("USER") or str(os.getuid())


def _ask(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(f"`{' '.join(command)}` says: {(done.stderr or done.stdout).strip()}")
    return done.stdout
