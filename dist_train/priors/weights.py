"""Files of frozen weights: where they come from, whether they are whole, what they are."""

import fcntl
import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dist_train.ranks import is_main
from shards.schema import sha256_of

logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """A published file; its name is the end of the url."""

    url: str
    sha256: str
    num_bytes: int

    @property
    def name(self) -> str:
        """Name of the file in the cache."""
        return self.url.rpartition("/")[2]


_SAM = "https://dl.fbaipublicfiles.com/segment_anything/"
SAM_CHECKPOINTS = {
    "vit_b": Source(
        _SAM + "sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912", 375_042_383
    ),
    "vit_l": Source(
        _SAM + "sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622", 1_249_524_607
    ),
    "vit_h": Source(
        _SAM + "sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e", 2_564_550_879
    ),
    "tiny_vit": Source(
        "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/f706ad9c4eb7f219c00d9050e46328518ffb65d2/weights/"
        "mobile_sam.pt",
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        40_728_226,
    ),
}
VGG19 = Source(
    "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
    "dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44",
    574_673_361,
)


def cache_dir() -> Path:
    """Folder of downloaded weights: $XDG_CACHE_HOME/restill, or ~/.cache/restill."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "restill"


def cached(source: Source) -> Path | None:
    """The file in the cache, if it is there and whole; asks no network."""
    path = cache_dir() / source.name
    return path if path.is_file() and sha256_of(path) == source.sha256 else None


def fetch(source: Source) -> Path:
    """The file in the cache, downloaded if it is not there. What is not whole never carries the final name.

    Raises:
        OSError: no network, no such file, a cut transfer, a full disk, a cache that cannot be written.
        ValueError: what came is not the file that was published; it has been removed.
    """
    import pooch

    if path := cached(source):
        return path
    path = cache_dir() / source.name
    logger.info("downloading %s (%.2f GiB) to %s", source.url, source.num_bytes / 2**30, path)
    pooch.get_logger().setLevel(logging.WARNING)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{source.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one rank of a node downloads; the others wait here, then find the file
            pooch.retrieve(
                source.url,
                f"sha256:{source.sha256}",
                fname=source.name,
                path=path.parent,
                downloader=pooch.HTTPDownloader(progressbar=is_main(), chunk_size=2**20),
            )
    except ValueError as error:
        raise ValueError(
            f"{source.url} did not give the published file, and what it gave was removed: {error}"
        ) from error
    except OSError as error:  # of which requests' errors are kinds
        raise OSError(
            f"cannot download {source.url}: {error}. Fetch it by other means and put it at {path}, "
            "or give its path in the configuration"
        ) from error
    return path


def load_state(path: Path, *, setting: str) -> dict[str, Tensor]:
    """Tensors by name from a .pth file, on the CPU; no code in it is run.

    Args:
        path: file.
        setting: key of the configuration that named it, for errors.

    Raises:
        ValueError: the file is missing, damaged, or not a dictionary of tensors.
    """
    if not path.is_file():
        raise ValueError(f"{setting}={path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, IndexError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{setting}={path}: not a readable PyTorch file, or cut short ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        held = sorted(map(str, state))[:5] if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{setting}={path}: wanted a dictionary of tensors by name, found {held}")
    return state


def check_state(state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], *, setting: str, what: str) -> None:
    """Make sure that a file holds the tensors of a net; more may be in it.

    Raises:
        ValueError: saying what the file looks like instead, and the first name that is missing or has another shape.
    """
    for name, shape in wanted.items():
        if name not in state or state[name].shape != shape:
            found = f"of shape {tuple(state[name].shape)}" if name in state else "missing"
            raise ValueError(
                f"{setting}: not the weights of {what}; it looks like {looks_like(state)} "
                f"({name} is {found}, not {tuple(shape)})"
            )


def looks_like(state: Mapping[str, Tensor]) -> str:
    """What frozen net a state dict is probably of, in words."""
    if (table := state.get("image_encoder.pos_embed")) is not None:
        width = table.shape[-1]
        return "SAM " + {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}.get(width, f"with an encoder {width} wide")
    if "image_encoder.patch_embed.seq.0.c.weight" in state:
        return "MobileSAM"
    if "conv0.weight" in state and "conv51.weight" in state:
        return f"a VGG-19 encoder for style transfer, {len(state['conv11.weight'])} channels wide (vgg19_16x has 16)"
    if "features.0.weight" in state:
        convs = sum(name.startswith("features.") and value.ndim == 4 for name, value in state.items())
        batch_norm = " with batch norm" if any(name.endswith("running_mean") for name in state) else ""
        return f"torchvision's VGG-{convs + 3}{batch_norm}"
    return f"something else: {len(state)} tensors, {', '.join(list(state)[:3])} ..."
