"""What the ranks of test_priors_remote.py do."""

import os

import torch

from dist_train import ranks
from dist_train.config import RegionsConfig, RemoteConfig
from dist_train.priors import build_prior

REGIONS = RegionsConfig(num_masks=4, scale=50, min_area_px=16)


def ask(home: str, servers: tuple[str, ...], timeout_s: float) -> tuple[bool, str]:
    """Whether this rank has masks that are the local ones, and who gave them; or the error."""
    os.environ["XDG_CONFIG_HOME"] = home  # where the key lies
    try:
        prior = build_prior(RemoteConfig(of=REGIONS, servers=servers, timeout_s=timeout_s), torch.device("cpu"))
    except ValueError as error:
        return False, str(error)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(ranks.rank()))
    found, wanted = prior(image), build_prior(REGIONS, torch.device("cpu"))(image)
    return torch.equal(found.masks, wanted.masks), prior.describe()["weights"]
