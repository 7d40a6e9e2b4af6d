"""Is this machine fit to train and restore, and are these files whole? `python -m launch.doctor [PATH ...]`."""

import argparse
import contextlib
import importlib
import io
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from launch.command import program

# Nothing but the standard library up here: a package that cannot be imported is a finding, not the end of the doctor.

PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "deepspeed": "deepspeed",
    "accelerate": "accelerate",
    "segment_anything": "segment-anything",
    "webdataset": "webdataset",
    "wandb": "wandb",
    "cv2": "opencv-python",
    "skimage": "scikit-image",
    "safetensors": "safetensors",
    "pydantic": "pydantic",
}
"""Module -> distribution."""
TRAINING = ("torchvision", "deepspeed", "accelerate", "segment_anything", "webdataset", "wandb", "skimage")
"""Modules of the extra `train`: restoring and scoring do without."""

NO_LIBGL = (
    "OpenCV's window code wants the system library libGL, which servers lack: apt-get install libgl1 libglib2.0-0, or "
    "pip uninstall opencv-python && pip install opencv-python-headless"
)


class Finding(NamedTuple):
    """One line of the table."""

    status: Literal["ok", "warn", "FAIL"]
    subject: str
    detail: str
    mend: str = ""


Findings = Iterator[Finding]


def main(argv: list[str] | None = None) -> int:
    """Examine, print the table; returns 1 if something fails."""
    parser = argparse.ArgumentParser(
        prog=program("launch.doctor"), description="Examine the installation and the machine, then each PATH."
    )
    parser.add_argument(
        "paths", nargs="*", type=Path, metavar="PATH", help="a folder of shards, a run, a configuration, weights"
    )
    parser.add_argument(
        "--slurm", action="store_true", help="also what slurm/train.sh claims, on a login node of the cluster"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are written (default: runs)")
    args = parser.parse_args(argv)
    checks: list[tuple[str, Callable[[], Findings]]] = [
        ("packages", check_packages),
        ("torchvision", check_torch_pair),
        ("opencv", check_single_opencv),
        ("backends", check_backends),
        ("gpu", check_gpus),
        ("machine", check_machine),
        ("runs", lambda: check_runs_folder(args.runs)),
        ("weights", check_cached_weights),
        *((str(path), lambda path=path: check_path(path)) for path in args.paths),
    ]
    if args.slurm:
        from launch.doctor_slurm import check_slurm

        configs = [path for path in args.paths if path.suffix in (".yaml", ".yml")]
        checks.append(("slurm", lambda: check_slurm(args.runs, configs)))
    num_failed = 0
    for subject, check in checks:
        for finding in examine(subject, check):
            num_failed += finding.status == "FAIL"
            print(f"{finding.status:5} {finding.subject:18} {finding.detail}")
            if finding.mend:
                print(f"{'':5} {'':18} -> {finding.mend}")
    print("all is well" if not num_failed else f"{num_failed} problems")
    return int(num_failed > 0)


def examine(subject: str, check: Callable[[], Findings]) -> Findings:
    """Findings of a check; one that breaks is itself a finding."""
    try:
        yield from check()
    except Exception as error:  # the doctor must live to report the rest
        yield Finding(
            "FAIL", subject, f"could not be examined: {type(error).__name__}: {error}", "mend what is above first"
        )


def check_packages() -> Findings:
    """The interpreter, whether everything can be imported, and which version it is."""
    yield Finding("ok", "python", f"{platform.python_version()}, {sys.executable}")
    left_out: tuple[str, ...] = ()
    if not any(_version(PACKAGES.get(module, module)) for module in TRAINING):
        left_out = TRAINING
        yield Finding(
            "warn",
            "training",
            "not installed: this is for restoring and scoring",
            "to train: pip install 'restill[train]'",
        )
    for module, distribution in PACKAGES.items():
        if module in left_out:
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # deepspeed talks when it is imported
                imported = importlib.import_module(module)
        except Exception as error:  # broken installations raise anything
            yield Finding("FAIL", module, f"cannot be imported: {error}", _mend_import(distribution, error))
        else:
            yield Finding("ok", module, _version(distribution) or f"from {imported.__file__}")


def _mend_import(distribution: str, error: Exception) -> str:
    text = str(error)
    if distribution == "opencv-python" and ("libGL" in text or "libgthread" in text):
        return NO_LIBGL
    if "torchvision::" in text:
        return "torch and torchvision are of different releases; see below"
    installed = _version(distribution) is not None
    return f"pip install {'--force-reinstall --no-deps ' if installed else ''}{distribution}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check_torch_pair() -> Findings:
    """Whether torchvision was built for this torch; segment_anything needs it."""
    torch_version, vision_version = _version("torch"), _version("torchvision")
    if torch_version is None or vision_version is None:
        return  # reported above
    pair = f"{vision_version} with torch {torch_version}"
    needs = [
        need.split(";")[0].strip() for need in metadata.requires("torchvision") or () if need.startswith("torch==")
    ]
    if needs and needs[0] != f"torch=={torch_version.split('+')[0]}":
        mend = "install both in one command: pip install -c constraints.txt torch torchvision"
        yield Finding("FAIL", "torch pair", f"torchvision {pair}, but it was built for {needs[0]}", mend)
    else:
        yield Finding("ok", "torch pair", f"torchvision {pair}")


def check_single_opencv() -> Findings:
    """Two OpenCV distributions overwrite each other's files."""
    names = [f"opencv-{kind}" for kind in ("python", "python-headless", "contrib-python", "contrib-python-headless")]
    found = [name for name in names if _version(name)]
    if len(found) > 1:
        mend = f"pip uninstall {' '.join(found)}, then install the one you want"
        yield Finding("warn", "opencv", f"{' and '.join(found)} share one folder, cv2", mend)


def check_backends() -> Findings:
    """Ways for ranks to talk."""
    import torch
    import torch.distributed as dist

    has = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    needed = {"gloo": True, "nccl": torch.cuda.is_available()}
    for name, there in has.items():
        if there:
            yield Finding("ok", name, "available")
        elif needed[name]:
            yield Finding("FAIL", name, "not in this build of torch", "install torch from PyPI: pip install torch")
        else:
            yield Finding("ok", name, "not in this build of torch; without a GPU it is not needed")


def check_gpus() -> Findings:
    """GPUs that PyTorch sees, and those it should see."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding("ok", f"gpu {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    elif Path("/dev/nvidia0").exists():
        if torch.version.cuda is None:
            mend = "this torch is a CPU build; pip install torch from PyPI"
        else:
            mend = f"this torch wants a driver for CUDA {torch.version.cuda}; see nvidia-smi, and CUDA_VISIBLE_DEVICES"
        yield Finding("FAIL", "gpu", "there is one, but PyTorch does not see it", mend)
    else:
        yield Finding("ok", "gpu", "none: everything runs on the CPU, slowly; SAM takes minutes per picture there")


def check_machine() -> Findings:
    """Cores, memory, and the shared memory that loader processes pass batches through."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("ok", "cores", str(cores))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if memory < 6:
        yield Finding("warn", "memory", f"{memory:.1f} GiB", "a rank takes about 2 GiB; start fewer of them")
    else:
        yield Finding("ok", "memory", f"{memory:.1f} GiB")
    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free / 2**30) < 0.5:
        mend = "docker run --shm-size=2g, or data.workers=0 in the run"
        yield Finding("warn", "shared memory", f"{free:.2f} GiB free", mend)


def check_runs_folder(folder: Path) -> Findings:
    """Whether runs can be written, and for how long the disk lasts."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        yield Finding(
            "FAIL", str(folder), f"cannot be written: {error}", f"chown or chmod {there}, or set out= in the run"
        )
        return
    free = shutil.disk_usage(there).free / 2**30
    if free < 5:
        yield Finding(
            "warn", str(folder), f"writable, but only {free:.1f} GiB free", "checkpoints need room: free the disk"
        )
    else:
        yield Finding("ok", str(folder), f"writable, {free:.0f} GiB free")


def check_cached_weights() -> Findings:
    """Checkpoints of SAM and VGG in the cache. None is needed for the `regions` prior."""
    from dist_train.priors.weights import SAM_CHECKPOINTS, VGG19, cache_dir, cached

    sources = {f"sam {name}": source for name, source in SAM_CHECKPOINTS.items()} | {"vgg19": VGG19}
    for name, source in sources.items():
        path = cache_dir() / source.name
        if not path.exists():
            size = f"{source.num_bytes / 1e9:.1f} GB"
            yield Finding("ok", name, f"not in the cache ({path}); {size} when a run asks for it and may download")
        elif cached(source):
            yield Finding("ok", name, f"{path}, whole")
        else:
            yield Finding(
                "FAIL", name, f"{path} is not the published file", f"rm {path}; it is fetched again when needed"
            )


def check_path(path: Path) -> Findings:
    """One thing the user named: shards, a run, a configuration, weights."""
    from dist_train.checkpoint import find
    from dist_train.load import load_student

    try:
        if (path / "manifest.json").is_file():
            yield from check_shards(path)
        elif path.suffix in (".yaml", ".yml"):
            yield from check_config(path)
        elif path.suffix == ".safetensors":
            _, card = load_student(path)
            origin = f"step {card['step']}" if "step" in card else f"from {card['official']['file']}"
            yield Finding(
                "ok", str(path), f"student {card['net']['name']}, {origin}, {card['parameters']:,} parameters"
            )
        elif path.suffix in (".pth", ".pt"):
            yield from check_official(path)
        elif path.is_dir() and (newest := find(path)):
            yield Finding("ok", str(path), f"run; its newest whole checkpoint is {newest.name}")
        elif not path.exists():
            yield Finding("FAIL", str(path), "no such file or folder", "check the spelling")
        else:
            what = "neither shards (manifest.json) nor a run (checkpoints/) nor .yaml, .safetensors or .pth"
            mend = "an interrupted `python -m shards write`? run it again" if path.is_dir() else ""
            yield Finding("FAIL", str(path), what, mend)
    except ValueError as error:
        yield Finding("FAIL", str(path), str(error))


def check_official(path: Path) -> Findings:
    """What net a .pth file holds, whether all of it, and what it cannot say."""
    from dist_train.config import ConditioningConfig
    from dist_train.nets.identify import identify
    from dist_train.nets.official import open_official, read_official, unsaid
    from dist_train.priors.weights import looks_like

    state = read_official(path)
    if identify(state) is None:
        yield Finding("ok", str(path), looks_like(state))
        return
    net, found = open_official(path, {})
    num_parameters = sum(parameter.numel() for parameter in net.parameters())
    yield Finding("ok", str(path), f"{found.title}, {num_parameters:,} parameters")
    settings = type(found.config).model_fields | ConditioningConfig.model_fields
    for key, value in unsaid(found.config, found.conditioning).items():
        about = " ".join((settings[key].description or "").split())
        yield Finding("ok", f"  {key}", f"{value} unless given (--net {key}=...): {about}")


def check_shards(folder: Path) -> Findings:
    """Manifest, index and the shards' sizes; `python -m shards check` reads every byte."""
    from shards.check import check

    report = check(folder, deep=False)
    for problem in report.problems:
        yield Finding("FAIL", str(folder), problem)
    if not report.problems:
        yield Finding("ok", str(folder), f"{report.num_samples} samples in {report.num_shards} shards")


def check_config(path: Path) -> Findings:
    """The configuration itself, then the shards that it names."""
    from dist_train.config import load_run

    run = load_run(path)
    yield Finding("ok", str(path), f"run {run.name}: {run.task}, {run.student.name}, {run.optim.steps} steps")
    for folder in filter(None, (*(part.path for part in run.data.sets), run.data.val)):
        if Path(folder).exists():
            yield from check_shards(Path(folder))
        else:
            yield Finding(
                "FAIL", folder, "no such folder of shards", f"python -m shards write LAYOUT --src DIR --out {folder}"
            )


if __name__ == "__main__":
    sys.exit(main())
