"""FID: the formula, the features, every picture once, and refusals."""

import copy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from dist_train import fid as module
from dist_train.fid import InceptionFeatures, frechet_distance, title

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def by_covariances(a: np.ndarray, b: np.ndarray) -> float:
    """The formula as it is printed, in the space that the features span, where covariances are small."""
    basis = np.linalg.qr(np.concatenate([a, b]).T)[0] if len(a) + len(b) < a.shape[1] else np.eye(a.shape[1])
    a, b = a @ basis, b @ basis
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.trace(np.real(sqrtm(cov_a @ cov_b)))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def test_the_formula_equals_that_of_covariances() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 7)), rng.normal(0.3, 2.0, size=(45, 7)) @ rng.normal(size=(7, 7))
    assert frechet_distance(a, b) == pytest.approx(by_covariances(a, b), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(a[:1], b)


def test_few_pictures_are_said_to_be_few() -> None:
    assert "n=2048, rank-deficient" in title(2048) and "rank" not in title(2049) and "antialias off" in title(2049)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the Inception net; as drawn by default they would let nothing through."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    net_class = inception.FeatureExtractorInceptionV3
    with (
        patch.object(inception, "load_state_dict_from_url", lambda *_, **__: None),
        patch.object(net_class, "load_state_dict", lambda *_: None),
    ):
        net = net_class("random", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        if parameter.ndim == 4:
            fan_in = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5
    path = tmp_path_factory.mktemp("fid") / "inception.pth"
    torch.save(net.state_dict(), path)
    return path


def test_distances_are_of_every_picture_once_whoever_saw_it(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    gt = [rng.integers(0, 256, (20, 30 + i, 3), dtype=np.uint8) for i in range(3)]
    student = [np.clip(picture.astype(int) // 2 + 40, 0, 255).astype(np.uint8) for picture in gt]
    alone = InceptionFeatures(weights, device=CPU)
    ranks = [copy.copy(alone), copy.copy(alone)]
    for rank in ranks:
        rank._seen = {}
    for number in range(3):
        for name, pictures in (("gt", gt), ("student", student)):
            alone.see(name, f"{number}", pictures[number])
    for index in (0, 1, 2, 0):  # two ranks, three pictures: the last pass of one is for a picture of the other
        for name, seen in alone._seen.items():
            ranks[index % 2]._seen.setdefault(name, {})[f"{index}"] = seen[f"{index}"]
    stacked: dict[str, Any] = {name: np.stack(list(seen.values())) for name, seen in alone._seen.items()}
    want = by_covariances(stacked["student"], stacked["gt"])
    assert want > 0.1
    distances = alone.distances()
    assert distances == {"student": pytest.approx(want, rel=1e-6)}
    monkeypatch.setattr(module.ranks, "gather_objects", lambda _: [rank._seen for rank in ranks])
    assert ranks[0].distances() == ranks[1].distances() == distances


def test_without_the_right_weights_it_says_what_is_wanted(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    with pytest.raises(ValueError, match="--fid-weights names pt_inception"):
        InceptionFeatures(tmp_path / "none.pth", device=CPU)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not of FID's Inception net"):
        InceptionFeatures(tmp_path / "other.pth", device=CPU)
    torch.save(Path("code"), tmp_path / "pickle.pth")
    with pytest.raises(ValueError, match="more or less than weights"):
        InceptionFeatures(tmp_path / "pickle.pth", device=CPU)


def test_without_torch_fidelity_it_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"pip install 'restill\[scores\]'"):
        InceptionFeatures(tmp_path / "any.pth", device=CPU)
