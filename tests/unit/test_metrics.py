"""Metrics against the authors' MATLAB code (golden.json), the official Python code, and scikit-image."""

import json
import math

import cv2
import numpy as np
import pytest

from dist_train import metrics
from dist_train.protocols import PROTOCOLS_SAY, protocol_name
from tests.helpers.shared import parity, shared

pytestmark = pytest.mark.unit

GOLDEN = {
    "rgb": ("rgb_psnr", "rgb_ssim_v1_mean"),
    "rain200": ("Yuint8_psnr", "Yuint8_ssim_v1"),
    "did_ddn": ("Ydouble_psnr", "Ydouble_ssim_autodown"),
    "gopro": ("rgb_psnr", "rgb_ssim_3d_python"),
}
FORMER = {"y_uint8": "rain200", "y_double": "did_ddn"}


@pytest.mark.parametrize("pair", ["Rain100L_1", "PReNet_L1", "GoPro_Istanbul", "PolyU_chair11"])
def test_real_pairs_score_as_the_authors_code_does(pair):
    folder = shared("parity", "metrics")
    golden = json.loads((folder / "golden.json").read_text())
    restored, gt = (cv2.imread(str(folder / name))[..., ::-1] for name in golden["files"][pair])
    for protocol, (psnr, ssim) in GOLDEN.items():
        got = metrics.score(restored, gt, protocol)
        assert got["psnr"] == pytest.approx(golden["pairs"][pair][psnr], abs=1e-5), protocol
        assert got["ssim"] == pytest.approx(golden["pairs"][pair][ssim], abs=1e-5), protocol


def test_gopro_equals_nafnet_code_and_did_ddn_rcdnet_s():
    import torch

    fixture = torch.load(parity("metrics_losses.pt"), weights_only=True)
    pictures = [metrics.to_u8(fixture[side][0]) for side in ("pred", "gt")]
    for protocol, psnr, ssim, abs_tol in (
        ("gopro", "nafnet.calculate_psnr.uint8", "nafnet.calculate_ssim.uint8.ssim3d", 1e-5),
        ("rgb", "nafnet.calculate_psnr.uint8", "nafnet.calculate_ssim.uint8.ssim2d_multichannel_array", 1e-1),
        # Theirs are of the float picture, ours of the rounded one.
        ("did_ddn", "rcdnet.matlab.psnrY(reimplemented)", "rcdnet.matlab.ssimY(reimplemented)", 1e-2),
    ):
        got = metrics.score(*pictures, protocol)
        assert got["psnr"] == pytest.approx(fixture["values"][psnr], abs=abs_tol), protocol
        assert got["ssim"] == pytest.approx(fixture["values"][ssim], abs=abs_tol), protocol


def test_rgb_equals_scikit_image(rng):
    from skimage.metrics import structural_similarity

    a, b = _pair(rng, 40, 57)
    want = structural_similarity(
        a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert metrics.score(a, b, "rgb")["ssim"] == pytest.approx(want, abs=1e-9)


def test_luma_equals_scikit_image(rng):
    from skimage.color import rgb2ycbcr

    picture, _ = _pair(rng, 40, 57)
    np.testing.assert_allclose(metrics.y_double(picture), rgb2ycbcr(picture)[..., 0], atol=1e-9)


def test_even_downsampling_takes_the_pixels_matlab_takes():
    # The golden pairs shrink by 1 and 3 only; a factor of 4 covers x[i-1..i+2] around x[i], edges mirrored.
    plane = np.arange(64.0).reshape(8, 8) ** 1.5
    padded = np.pad(plane, ((1, 2), (1, 2)), mode="symmetric")
    want = [[padded[i : i + 4, j : j + 4].mean() for j in (0, 4)] for i in (0, 4)]
    np.testing.assert_allclose(metrics._shrink(plane, 4), want)


def test_equal_pictures(rng):
    a, _ = _pair(rng, 16, 16)
    for protocol in metrics.PROTOCOLS:
        assert metrics.score(a, a, protocol) == {"psnr": math.inf, "ssim": pytest.approx(1.0)}


def test_every_protocol_has_a_sentence_and_former_names_mean_the_new_ones(rng):
    assert metrics.PROTOCOLS.keys() == PROTOCOLS_SAY.keys() == {*GOLDEN, "awgn"}
    assert metrics.PROTOCOLS["awgn"] is metrics.PROTOCOLS["rgb"]
    pair = _pair(rng, 16, 16)
    for former, name in FORMER.items():
        assert protocol_name(former) == name and metrics.score(*pair, former) == metrics.score(*pair, name)


def test_collapse_is_a_loss_of_more_than_3_db():
    gt = np.zeros((16, 16, 3), np.uint8)
    lossless = np.full_like(gt, 10)
    errors = {level: metrics.psnr(lossless, gt) - metrics.psnr(np.full_like(gt, level), gt) for level in (14, 15)}
    assert errors[14] < 3 < errors[15]  # 2.92 and 3.52 dB
    for level, loss in errors.items():
        assert metrics.is_collapsed(np.full_like(gt, level), lossless, gt) == (loss > 3)
    assert not metrics.is_collapsed(lossless, np.full_like(gt, 200), gt)


def test_exactly_3_db_is_no_collapse(monkeypatch):
    monkeypatch.setattr(metrics, "psnr", lambda picture, gt: float(picture))
    assert not metrics.is_collapsed(27, 30, 0) and metrics.is_collapsed(26.999, 30, 0)


def test_to_u8_clamps_and_rounds():
    image = np.array([-0.2, 0.0, 0.499 / 255, 0.5 / 255, 254.6 / 255, 1.7], dtype=np.float32)
    assert metrics.to_u8(np.broadcast_to(image, (3, 1, 6)))[0, :, 2].tolist() == [0, 0, 0, 1, 255, 255]


def test_what_cannot_be_compared_is_refused(rng):
    a, b = _pair(rng, 16, 16)
    with pytest.raises(ValueError, match="no protocol 'psnr'; there are rgb"):
        metrics.score(a, b, "psnr")
    with pytest.raises(ValueError, match=r"restored picture is \(16, 15\)"):
        metrics.score(a[:, 1:], b, "rgb")
    with pytest.raises(ValueError, match="uint8 RGB"):
        metrics.score(a / 255.0, b, "rgb")
    with pytest.raises(ValueError, match="11 x 11"):
        metrics.score(a[:10], b[:10], "rgb")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def _pair(rng, height, width):
    gt = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise = rng.integers(-9, 10, gt.shape)
    return np.clip(gt + noise, 0, 255).astype(np.uint8), gt
