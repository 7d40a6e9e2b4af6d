import pytest
import torch

from dist_train.config import SamConfig
from dist_train.priors.automatic import AutomaticMasks
from dist_train.priors.sam import SamPrior
from tests.helpers.tiny_sam import LOOSE, SIZE_PX, picture, tiny_sam

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: fp16 SAM runs on a GPU only"),
]


def segment(dtype: str, generator: str) -> torch.Tensor:
    """(N,H,W) bool: the masks of two copies of a picture, found to be the same for both."""
    image = torch.from_numpy(picture()).permute(2, 0, 1)[None].cuda() / 255
    prior = SamPrior(
        tiny_sam().cuda(), SamConfig(generator=generator, dtype=dtype, num_masks=200, **LOOSE), weights="random"
    )
    with torch.autocast("cuda", torch.bfloat16):  # of the training step; none of SAM's business
        found = prior(image.repeat(2, 1, 1, 1))
    assert found.masks.is_cuda and torch.equal(found.masks[0], found.masks[1])
    return found.masks[0][found.valid[0]]


def iou(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one & other).sum() / (one | other).sum()).item()


@pytest.mark.parametrize("generator", ["reference", "batched"])
def test_fp16_masks_are_those_of_fp32(generator: str):
    half, full = segment("auto", generator), segment("fp32", "reference")
    assert len(half) >= 5
    # Near-ties in the filters flip with any rounding, so masks are matched by overlap, never counted.
    best = [max(iou(mask, want) for want in full) for mask in half]
    assert sum(best) / len(best) > 0.85


@pytest.mark.parametrize("generator", ["reference", "batched"])
def test_bf16_finds_masks(generator: str):
    assert len(segment("bf16", generator)) >= 5


def test_the_batched_path_is_captured_as_a_cuda_graph():
    masks = AutomaticMasks(tiny_sam().cuda(), num_masks=16, **LOOSE)
    images = torch.from_numpy(picture()).permute(2, 0, 1)[None].repeat(2, 1, 1, 1).cuda() / 255
    frame = masks.frame(*images.shape[-2:])
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            want = [part.clone() for part in masks.segment(images, frame)]
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # which fails if anything waits for the device
            found = masks.segment(images, frame)
    graph.replay()
    assert all(torch.equal(got, wanted) for got, wanted in zip(found, want, strict=True))


def test_fp16_embedding_is_finite_and_near_fp32_where_activations_are_large():
    sam, reference = tiny_sam().cuda(), tiny_sam().cuda().eval()
    SamPrior(sam, SamConfig(generator="reference", dtype="fp16", **LOOSE), weights="random")
    image = 100 * torch.randn(1, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        got, want = sam.image_encoder(image), reference.image_encoder(image)
    assert got.dtype == torch.float32 and got.isfinite().all()
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
