"""What all entry points share: logging with the rank in front, and errors as one line a person can act on."""

import argparse
import logging
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import yaml

from shards.cache import ShardCache
from shards.schema import ShardError

if TYPE_CHECKING:
    import torch

# No torch up here, nor in the heads of the entry points: --help shall not wait for it.

EXTRAS = {
    "deepspeed": "train", "accelerate": "train", "webdataset": "train", "wandb": "train", "segment_anything": "train",
    "torchvision": "train", "skimage": "train", "pooch": "train", "matplotlib": "train",
    "segmentation_models_pytorch": "psp", "timm": "mobilesam", "torchmetrics": "scores", "torch_fidelity": "scores",
    "onnx": "onnx", "onnxruntime": "onnx", "onnxscript": "onnx", "huggingface_hub": "hub", "av": "video",
    "gradio": "page", "wandb_workspaces": "dashboard", "tensorboard": "tensorboard",
}  # fmt: skip
"""Module -> the extra of pyproject.toml that brings it."""


def set_up_logging() -> None:
    """Log to stderr; every line names its rank, and ranks other than the main one speak up only with warnings."""
    from dist_train import ranks

    logging.basicConfig(
        level=logging.INFO if ranks.is_main() else logging.WARNING,
        format=f"%(asctime)s [rank {ranks.rank()}] %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )


def device_of(wanted: str) -> "torch.device":
    """Where one process computes.

    Args:
        wanted: `auto` (a GPU if there is one), `cpu` or `cuda`, as --device has it.

    Raises:
        ValueError: a GPU is wanted, and there is none.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no GPU; python -m launch.doctor tells why")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def add_net_option(parser: argparse.ArgumentParser) -> None:
    """The option --net, a list of (key, value), for `dist_train.load.load_net`."""
    parser.add_argument(
        "--net",
        nargs="+",
        default=[],
        type=setting,
        metavar="KEY=VALUE",
        help="what an official file cannot say of its net, for example img_size=128; launch.doctor lists it",
    )


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """The options --cache-dir and --cache-gib, for `cache_of`."""
    parser.add_argument("--cache-dir", help="where shards of a URL are kept (default: ~/.cache/restill/shards)")
    parser.add_argument("--cache-gib", type=float, default=50, help="the most it may hold (default: 50)")


def cache_of(args: argparse.Namespace) -> ShardCache:
    """The cache that the options name."""
    return ShardCache(args.cache_dir, limit_gib=args.cache_gib)


def setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE of a command line, the value read as YAML; a `type` for argparse."""
    key, equals, value = text.partition("=")
    try:
        if equals:
            return key, yaml.safe_load(value)
    except yaml.YAMLError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")


def mend_import(error: ModuleNotFoundError) -> str:
    """What is missing and how to install it."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return f"{error}; install restill again, or see `restill doctor`"
    return f"this needs the package {module}: pip install 'restill[{EXTRAS[module]}]'"


def run_main(main: Callable[[], int], *, stopped: str = "stopped") -> int:
    """Call `main`; what a user can mend is printed without a traceback and gives exit code 2, Ctrl-C gives 130.

    So is a missing package that an extra would have brought.

    Errors of the configuration are met by all ranks alike, so every rank that fails says so and names itself.

    Args:
        main: the program; returns the exit code.
        stopped: what to say at Ctrl-C.
    """
    try:
        return main()
    except Exception as error:
        from dist_train import ranks

        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRAS
        if not missing and not isinstance(error, (ValueError, OSError, ShardError, ranks.TrainingError)):
            raise
        where = f" [rank {ranks.rank()}]" if ranks.world_size() > 1 else ""
        told = mend_import(error) if isinstance(error, ModuleNotFoundError) else error
        print(f"error{where}: {told}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130


def for_json(value: Any) -> Any:
    """A tree of dictionaries and lists as JSON can say it, which knows neither NaN nor infinity: null for those."""
    if isinstance(value, dict):
        return {key: for_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
