"""Exports as the Hugging Face hub keeps them: a folder, or a repository of the hub, that holds

    model.safetensors   the weights
    config.json         the card as data: net, run, data, scores, sha256
    README.md           the card for people
    pictures/           what it shows

Such a folder goes wherever a file of weights does. Only the hub itself needs huggingface_hub and the network.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor, nn

from dist_train.card import readme
from dist_train.config import NetConfig
from dist_train.export import write_export
from dist_train.load import CONFIG, WEIGHTS, load_student

FILES = (WEIGHTS, CONFIG, "README.md", "pictures/*.png")


class RestillNet(nn.Module):
    """A student with its card, saved and loaded as the hub's other models are.

    Raises:
        ValueError: the student wants masks beside the picture.
    """

    def __init__(self, net: nn.Module, card: dict[str, Any]):
        super().__init__()
        if getattr(net, "wants_masks", False):
            raise ValueError("this net wants masks beside the picture: use dist_train.load.load_net(masks=True)")
        self.net = net
        self.card = card

    def forward(self, lq: Tensor) -> Tensor:
        """(B,3,H,W) RGB in [0,1], any size -> the same, not clamped."""
        restored: Tensor = self.net(lq)
        return restored

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, token: str | None = None, trust_code: bool = False
    ) -> "RestillNet":
        """Load from a folder, without the network, or else from the hub.

        Args:
            source: a folder that is there, a .safetensors file, or `OWNER/NAME` on the hub.
            revision: branch, tag or commit on the hub.
            token: for private repositories; None: that of `hf auth login`.
            trust_code: whether a repository may name a function to import that makes its net (`custom` nets).

        Returns:
            On the CPU in evaluation mode, no gradient to its parameters.

        Raises:
            ValueError: as `load_student`; the hub is not to be reached or has no such repository; it names code.
        """
        path = Path(source)
        if path.exists():
            return cls(*load_student(path))
        folder = _download(str(source), revision, token)
        return cls(*load_student(folder, trust_code=trust_code))

    def save_pretrained(self, folder: str | Path, *, licence: str | None = None, pictures: Sequence[Path] = ()) -> None:
        """Write a folder for the hub; what is already there under the same names is replaced.

        Args:
            folder: made if need be.
            licence: of the weights, as the hub spells it.
            pictures: PNG files to show, copied.
        """
        config = TypeAdapter(NetConfig).validate_python(self.card["net"])
        write_export(self.net, Path(folder) / WEIGHTS, config=config, facts=self.card)
        complete(Path(folder), licence=licence, pictures=pictures)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        licence: str | None = None,
        pictures: Sequence[Path] = (),
        public: bool = False,
        token: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` would write; see `push`."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder, licence=licence, pictures=pictures)
            return push(folder, repo_id, public=public, token=token)


def complete(folder: Path, *, licence: str | None, pictures: Sequence[Path]) -> None:
    """Make a folder with an export, `model.safetensors` and its card, one for the hub.

    Args:
        folder: of the export.
        licence, pictures: as for `RestillNet.save_pretrained`.
    """
    beside = (folder / WEIGHTS).with_suffix(".json")
    if beside.exists():
        beside.replace(folder / CONFIG)
    _, card = load_student(folder)
    shown = []
    for picture in pictures:
        (folder / "pictures").mkdir(exist_ok=True)
        shutil.copyfile(picture, folder / "pictures" / picture.name)
        shown.append(f"pictures/{picture.name}")
    title = card.get("config", {}).get("name") or folder.resolve().name
    (folder / "README.md").write_text(readme(card, title=title, licence=licence, pictures=shown))


def push(folder: Path, repo_id: str, *, public: bool = False, token: str | None = None) -> str:
    """Upload a folder for the hub, those files of it that belong there.

    Args:
        folder: as `complete` left it.
        repo_id: `OWNER/NAME`; made if it is not there.
        public: whether all may see a repository that is made.
        token: that may write; None: that of `hf auth login`.

    Returns:
        Where it is.

    Raises:
        ValueError: the hub is not to be reached, or refuses.
    """
    hub = _hub()
    load_student(folder)
    try:
        api = hub.HfApi(token=token)
        url = str(api.create_repo(repo_id, private=not public, exist_ok=True))
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(FILES))
    except Exception as error:  # the hub's, its HTTP library's or the system's: releases differ
        raise ValueError(f"{repo_id} was not pushed: {error}. A token that may write: hf auth login") from error
    return url


def _download(repo_id: str, revision: str | None, token: str | None) -> Path:
    hub = _hub()
    try:
        return Path(hub.snapshot_download(repo_id, revision=revision, token=token, allow_patterns=list(FILES)))
    except Exception as error:  # the hub's, its HTTP library's or the system's: releases differ
        raise ValueError(
            f"{repo_id} is no folder here, and did not come from the hub: {error}. Give a folder that launch.export "
            "--hub wrote, or OWNER/NAME"
        ) from error


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError("the hub needs huggingface_hub; pip install 'restill[hub]', or give a folder") from None
    return huggingface_hub
