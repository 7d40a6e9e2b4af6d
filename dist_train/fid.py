"""Frechet Inception distance between restored and clean pictures, offline, the same for any number of ranks.

Features are those of torch-fidelity, which pytorch-fid's weights fit too: pictures are resized as TensorFlow 1 did,
without antialiasing, which alone moves the distance by a sixth. The rest is float64.

Heusel et al., GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017, Eq. 6.
"""

import pickle
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train import ranks
from dist_train.metrics import Picture

NUM_FEATURES = 2048


class InceptionFeatures:
    """What the Inception net sees in clean pictures and in each version of them.

    Args:
        weights: `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, or torch-fidelity's file of that name.
        device: of this rank.

    Raises:
        ValueError: no such file, another net's, or torch-fidelity is missing.
    """

    def __init__(self, weights: Path, *, device: torch.device) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise ValueError("FID needs torch-fidelity; install it: pip install 'restill[scores]'") from None
        _refuse_strange(weights)
        try:
            net = FeatureExtractorInceptionV3("fid", [str(NUM_FEATURES)], feature_extractor_weights_path=str(weights))
        except RuntimeError as error:
            raise ValueError(f"{weights} is not of FID's Inception net: {str(error).splitlines()[0]}") from None
        self._net, self._device = net.to(device), device
        self._seen: dict[str, dict[str, NDArray[np.float64]]] = {}

    @torch.no_grad()
    def see(self, name: str, key: str, picture: Picture) -> None:
        """Note the features of one picture; once more with the same name and key changes nothing.

        Args:
            name: of the version; `gt` for the clean ones.
            key: of the picture.
            picture: (H,W,3) uint8 RGB, any size.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].to(self._device)
        (features,) = self._net(pixels)
        self._seen.setdefault(name, {})[key] = features[0].cpu().double().numpy()

    def distances(self) -> dict[str, float]:
        """FID of each version from the clean pictures, those of all ranks taken together. All ranks call."""
        together: dict[str, dict[str, NDArray[np.float64]]] = {}
        for seen in ranks.gather_objects(self._seen):
            for name, features in seen.items():
                together.setdefault(name, {}).update(features)
        stacked = {name: np.stack([found[key] for key in sorted(found)]) for name, found in together.items()}
        return {name: frechet_distance(stacked[name], stacked["gt"]) for name in sorted(stacked) if name != "gt"}


def title(num_pictures: int) -> str:
    """What to call the distance of so many pictures: fewer than there are features give a biased number."""
    deficient = num_pictures < NUM_FEATURES + 1
    return f"FID(n={num_pictures}{', rank-deficient' if deficient else ''}, antialias off)"


def frechet_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """|mean(a) - mean(b)|^2 + tr(Sa + Sb - 2 (Sa Sb)^(1/2)) of two sets of features.

    With centred rows A and B, the trace of (Sa Sb)^(1/2) is the sum of the singular values of A B^T (nuclear norm) over
    the roots of both counts less one, since Sa Sb has the squares of these as its only eigenvalues. It is exact for few
    pictures too, where the root of the singular product of covariances is not.

    Args:
        a: (N,D) float64, N at least 2.
        b: (M,D).
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("FID needs at least two pictures, better thousands")
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    a, b = (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((mean_a - mean_b) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)


def _refuse_strange(weights: Path) -> None:
    """torch-fidelity would run whatever code a pickle holds."""
    if not weights.is_file():
        raise ValueError(
            f"no weights {weights}: --fid-weights names pt_inception-2015-12-05-6726825d.pth of pytorch-fid's releases"
        )
    try:
        torch.load(weights, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{weights} holds more or less than weights: {str(error).splitlines()[0]}") from None
