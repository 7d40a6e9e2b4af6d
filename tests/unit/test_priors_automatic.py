import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import skimage.data
import skimage.io
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dist_train.priors import automatic
from dist_train.priors.automatic import AutomaticMasks
from dist_train.priors.masks import MaskSet
from dist_train.priors.sam_attention import attend
from dist_train.priors.sam_decoder import decode, share
from dist_train.priors.sam_filters import choose, measure, suppress
from dist_train.priors.sam_resize import logit_taps, picture_taps, resample, resample_u8
from dist_train.priors.tiny_vit import build_mobile_sam
from tests.helpers.shared import shared
from tests.helpers.tiny_sam import LOOSE, AnalyticSam, picture, tiny_sam

pytestmark = pytest.mark.unit

STRICT = {"points_per_side": 9, "pred_iou_thresh": 0.8, "stability_score_thresh": 0.8}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(net: Any) -> Any:
    """In float64 and with no weight, bias or norm left at its initial value."""
    net = net.double().eval().requires_grad_(False)
    for seed, parameter in enumerate(net.parameters()):
        parameter.add_(0.3 * random(*parameter.shape, seed=seed) * max(parameter.std(correction=0).item(), 0.3))
    return net


def as_images(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255


def reference(sam: Any, rgb_u8: np.ndarray, **settings: Any) -> list[np.ndarray]:
    """Masks of segment_anything's generator, surest first, without empty ones."""
    from segment_anything import SamAutomaticMaskGenerator

    settings = {name: value for name, value in settings.items() if name != "points_per_batch"}
    records = SamAutomaticMaskGenerator(sam.eval(), **settings).generate(np.ascontiguousarray(rgb_u8))
    return [r["segmentation"] for r in sorted(records, key=lambda r: -r["predicted_iou"]) if r["area"]]


def found_in(masks: MaskSet, b: int = 0) -> set[bytes]:
    return {mask.numpy().tobytes() for mask in masks.masks[b][masks.valid[b]]}


def as_set(masks: list[np.ndarray]) -> set[bytes]:
    return {mask.tobytes() for mask in masks}


def mean_best_iou(masks: Tensor, others: Tensor) -> float:
    a, b = masks.flatten(1).double(), others.flatten(1).double()
    shared_px = a @ b.T
    return (shared_px / (a.sum(1)[:, None] + b.sum(1) - shared_px)).amax(1).mean().item()


def real_pictures() -> list[np.ndarray]:
    return [skimage.data.astronaut()[:120, 130:290], skimage.data.chelsea()[60:180, 120:280],
            skimage.data.coffee()[120:240, 180:340]]  # fmt: skip


def photos() -> list[np.ndarray]:
    paths = [shared("data", "segment_anything_photos", name) for name in ("dog.jpg", "truck.jpg")]
    return [skimage.io.imread(path)[150:270, 300:460] for path in paths]


@pytest.fixture
def analytic(monkeypatch):
    """Makes an AnalyticSam whose `share` and `decode` stand in for those of a real decoder."""

    def build(seed: int = 0) -> AnalyticSam:
        sam = AnalyticSam(seed, size_px=128)
        monkeypatch.setattr(automatic, "share", sam.share)
        monkeypatch.setattr(automatic, "decode", sam.decode)
        return sam

    return build


# The decoder and the encoder's attention


@pytest.mark.parametrize("published_size", [False, True])
def test_the_decoder_is_that_of_segment_anything(published_size):
    from segment_anything.modeling import MaskDecoder, TwoWayTransformer

    if published_size:
        transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
        decoder = perturbed(MaskDecoder(transformer_dim=256, transformer=transformer))
    else:
        decoder = perturbed(copy.deepcopy(tiny_sam().mask_decoder))
    channels, height, width = decoder.transformer_dim, 12, 9
    embeddings, dense = random(2, channels, height, width), random(1, channels, 1, 1, seed=1)
    positions, prompts = random(1, channels, height, width, seed=2), random(2, 5, 2, channels, seed=3)
    logits, quality = decode(decoder, share(decoder, embeddings + dense, positions), prompts)
    assert logits.shape == (2, 5, 3, 4 * height, 4 * width)
    for b in range(2):
        want = decoder(
            image_embeddings=embeddings[b : b + 1],
            image_pe=positions,
            sparse_prompt_embeddings=prompts[b],
            dense_prompt_embeddings=dense.expand(5, -1, height, width),
            multimask_output=True,
        )
        for got, wanted in zip((logits[b], quality[b]), want, strict=True):
            assert (got - wanted).abs().max() < 1e-12 * wanted.abs().max()


@pytest.mark.parametrize("tables_fit", [True, False])
def test_fused_attention_is_that_of_segment_anything(tables_fit):
    from segment_anything.modeling.image_encoder import Attention

    trained = (5, 7) if tables_fit else (8, 4)
    attention = perturbed(Attention(24, num_heads=3, use_rel_pos=True, input_size=trained))
    x = random(2, 5, 7, 24)
    torch.testing.assert_close(attend(attention, x), attention(x), rtol=1e-12, atol=1e-12)


# The two resizes


@pytest.mark.parametrize("size", [(256, 256), (128, 192), (97, 61), (1100, 700), (3, 5), (500, 1024)])
def test_pictures_are_resized_as_by_pillow_to_the_bit(size):
    from segment_anything.utils.transforms import ResizeLongestSide

    rgb_u8 = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    want = ResizeLongestSide(512).apply_image(rgb_u8)
    rows, columns = (picture_taps(old, new) for old, new in zip(size, want.shape, strict=False))
    got = resample_u8(torch.from_numpy(rgb_u8).permute(2, 0, 1).int(), rows, columns)
    assert np.array_equal(got.permute(1, 2, 0).numpy(), want)


@pytest.mark.parametrize("size", [(256, 256), (128, 192), (97, 61), (700, 1100)])
def test_logits_are_resized_as_by_segment_anything_without_its_canvas(size):
    from segment_anything.modeling import Sam
    from segment_anything.utils.transforms import ResizeLongestSide

    used = ResizeLongestSide.get_preprocess_shape(*size, 1024)
    logits = random(1, 2, 256, 256).float()
    want = Sam.postprocess_masks(AnalyticSam(size_px=1024), logits, used, size)
    rows, columns = (logit_taps(256, 1024, u, s) for u, s in zip(used, size, strict=True))
    torch.testing.assert_close(resample(resample(logits, columns, -1), rows, -2), want, rtol=0, atol=5e-6)
    if size == (256, 256):
        assert (16 * rows.weight[:, 100]).tolist() == [1, 14, 1]


# The filters


def test_measures_are_those_of_segment_anything():
    from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score

    logits = torch.stack([3 * random(20, 31, seed=s).float() - s for s in range(8)] + [torch.full((20, 31), -9.0)])
    logits[1, :4], logits[1, :, 25:] = -9, -9
    got = measure(logits[None], threshold=0.5, offset=1.0)
    assert torch.equal(got.boxes[0], batched_mask_to_box(logits > 0.5).float())
    want = calculate_stability_score(logits, 0.5, 1.0)
    torch.testing.assert_close(got.stability[0], want, rtol=0, atol=0, equal_nan=True)
    assert got.filled[0].tolist() == [True] * 8 + [False] and want[-1].isnan()


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7, 0.8])
@pytest.mark.parametrize("on_a_grid", [False, True])
def test_suppression_is_torchvisions(threshold, on_a_grid):
    from torchvision.ops import nms

    generator = torch.Generator().manual_seed(0)
    for num in (1, 30, 300):
        corner, extent = torch.rand(2, num, 2, generator=generator) * torch.tensor([[[100.0]], [[60.0]]])
        scores = torch.rand(num, generator=generator)
        if on_a_grid:  # equal boxes, equal scores, boxes without area, overlaps of just the threshold
            corner, extent, scores = (corner / 9).floor(), (extent / 6).floor(), (scores * 8).floor() / 8
        boxes = torch.cat([corner, corner + extent], 1)
        every = torch.ones(1, num, dtype=torch.bool)
        index, found = choose(
            scores[None], boxes[None], every, iou_threshold=threshold, candidates=num, rounds=31, num_masks=num
        )
        assert index[0][found[0]].tolist() == nms(boxes, scores, threshold).tolist()


def test_suppression_of_an_overlap_of_just_the_threshold_and_of_chains():
    from torchvision.ops import nms

    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 8, 10]])  # IoU 4/5, which is above 0.8 in float32
    assert nms(boxes, torch.tensor([2.0, 1.0]), 0.8).tolist() == [0]
    assert suppress(boxes[None], torch.ones(1, 2, dtype=torch.bool), iou_threshold=0.8, rounds=1).tolist() == [
        [True, False]
    ]

    start = 2.0 * torch.arange(40)
    chain = torch.stack([start, 0 * start, start + 10, 0 * start + 10], 1)  # each overlaps the next alone
    every = torch.ones(1, 40, dtype=torch.bool)
    greedy = nms(chain, -start, 0.6)
    assert greedy.tolist() == list(range(0, 40, 2))
    assert suppress(chain[None], every, iou_threshold=0.6, rounds=41)[0].nonzero().flatten().tolist() == greedy.tolist()
    short = suppress(chain[None], every, iou_threshold=0.6, rounds=5)[0].nonzero().flatten().tolist()
    assert short == [0, 2, 4]  # too few rounds lose boxes, and never keep two that overlap


def test_what_is_not_valid_neither_is_kept_nor_suppresses_and_few_candidates_suffice():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [51, 50, 60, 60], [90, 0, 99, 9]])
    scores, valid = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([False, True, True, True, True])
    settings = {"iou_threshold": 0.7, "rounds": 3}
    index, found = choose(scores[None], boxes[None], valid[None], candidates=9, num_masks=7, **settings)
    assert index[0][found[0]].tolist() == [1, 2, 4] and found.shape == (1, 7)
    for candidates, want in ((3, [0, 2]), (2, [0])):  # the third is only looked at if it is a candidate
        every = torch.ones_like(valid)
        index, found = choose(scores[None], boxes[None], every[None], candidates=candidates, num_masks=2, **settings)
        assert index[0][found[0]].tolist() == want


# The whole


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("source", [real_pictures, photos])
def test_masks_of_a_batch_are_those_of_segment_anything_to_the_bit(analytic, source, seed):
    sam, pictures = analytic(seed), source()
    want = [reference(sam, rgb_u8, **STRICT) for rgb_u8 in pictures]
    unfiltered = [reference(sam, rgb_u8, **STRICT | dict.fromkeys(list(STRICT)[1:], 0.0)) for rgb_u8 in pictures]
    assert min(map(len, want)) >= 3 and sum(map(len, unfiltered)) > 1.2 * sum(map(len, want))
    found = AutomaticMasks(sam, num_masks=200, points_per_batch=40, **STRICT)(as_images(pictures))
    for b, masks in enumerate(want):
        assert found.counts()[b] == len(masks) and found_in(found, b) == as_set(masks)
        areas = found.masks[b].sum((1, 2))
        assert torch.equal(areas, areas.sort(descending=True).values)


@pytest.mark.parametrize("shape", [(160, 90), (3, 5), (300, 200), (128, 128)])
def test_any_size_of_picture(analytic, shape):
    sam = analytic(1)
    rgb_u8 = skimage.data.astronaut()[: shape[0], 100 : 100 + shape[1]]
    want = reference(sam, rgb_u8, **STRICT)
    assert found_in(AutomaticMasks(sam, num_masks=200, **STRICT)(as_images([rgb_u8]))) == as_set(want)


def test_the_surest_masks_are_kept_however_prompts_are_chunked(analytic):
    sam, rgb_u8 = analytic(0), real_pictures()[0]
    best = reference(sam, rgb_u8, **STRICT)[:4]
    assert len(best) == 4
    for at_once in (1, 7, 1000):
        found = AutomaticMasks(sam, num_masks=4, points_per_batch=at_once, **STRICT)(as_images([rgb_u8]))
        assert found_in(found) == as_set(best)


@pytest.mark.parametrize("at_once", [1, 2])
def test_pictures_that_go_through_one_after_the_other_have_the_masks_of_all_at_once(analytic, at_once):
    sam, images = analytic(0), as_images(real_pictures())
    images[1, 0, 5, 5] = torch.nan
    want = AutomaticMasks(sam, **STRICT)(images)
    found = AutomaticMasks(sam, pictures_per_batch=at_once, **STRICT)(images)
    assert torch.equal(found.masks, want.masks) and torch.equal(found.valid, want.valid)
    assert want.counts()[1] == 0 < min(want.counts()[0], want.counts()[2])


@pytest.mark.parametrize("seed", [2, 14, 27])
def test_masks_of_a_transformer_are_those_of_segment_anything(seed):
    pictures = [picture(), *(p[:96, :80] for p in real_pictures())]
    want = [reference(tiny_sam(seed), rgb_u8, **LOOSE) for rgb_u8 in pictures]
    found = AutomaticMasks(tiny_sam(seed), num_masks=200, **LOOSE)(as_images(pictures))
    assert min(map(len, want)) >= 4
    # Rounding of sums moves single pixels of a boundary, and a threshold on a tie: not to the bit, but nearly.
    for b, masks in enumerate(want):
        mine, others = found.masks[b][found.valid[b]], torch.from_numpy(np.stack(masks))
        assert mean_best_iou(mine, others) > 0.97 and mean_best_iou(others, mine) > 0.97


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_finds_nearly_the_same(dtype):
    # Random weights sharpen every rounding into other masks; trained ones are far more patient.
    least = {torch.float16: 0.95, torch.bfloat16: 0.8}[dtype]
    images = as_images([p[:96, :80] for p in real_pictures()])
    full = AutomaticMasks(tiny_sam(14), num_masks=200, **LOOSE)(images)
    half = AutomaticMasks(tiny_sam(14), num_masks=200, dtype=dtype, **LOOSE)(images)
    agreement = [mean_best_iou(full.masks[b][full.valid[b]], half.masks[b][half.valid[b]]) for b in range(len(images))]
    assert sum(agreement) / len(agreement) > least


def test_the_path_is_one_graph():
    settings = {**LOOSE, "num_masks": 6, "nms_rounds": 3, "points_per_side": 3, "points_per_batch": 8}  # 4 + 4 + 1
    images = as_images([picture(), picture()[:, ::-1]])
    prior = AutomaticMasks(tiny_sam(), **settings)
    frame = prior.frame(*images.shape[-2:])
    run = torch.compile(prior.segment, fullgraph=True, backend="eager")  # a break or a synchronisation is an error
    with torch.no_grad():
        masks, valid = run(images, frame)
    want = prior(images)
    assert torch.equal(masks, want.masks) and torch.equal(valid, want.valid) and valid.any()


class _Elsewhere(TorchDispatchMode):
    """Notes the operations that touch anything but the GPU."""

    def __init__(self):
        super().__init__()
        self.num, self.found, self.halves = 0, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.num += 1
        self.halves += "convolution" in str(func) and out.dtype == torch.float16
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        if devices != {"cuda"}:
            self.found.add(f"{func} on {sorted(devices)}")
        return out


@pytest.mark.parametrize("build", [tiny_sam, partial(build_mobile_sam, None, input_px=128)])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_on_a_gpu_nothing_would_wait_for_it_or_leave_it(monkeypatch, build, dtype):
    """Without a GPU: on tensors of CUDA that have no data, reading one is an error. A capture wants no less."""
    if build is not tiny_sam:
        pytest.importorskip("timm", reason="MobileSAM is an extra")
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    sam = build()
    prior = AutomaticMasks(sam, num_masks=6, points_per_side=3, points_per_batch=8, dtype=dtype)
    frame = prior.frame(96, 80)

    def there(x):
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x

    with FakeTensorMode(), torch.no_grad():
        for module in sam.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = torch.nn.Parameter(there(parameter), requires_grad=False)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = there(buffer)
            for biases in list(getattr(module, "attention_bias_cache", {}).values()):
                module.attention_bias_cache["cuda:0"] = there(biases)
        images, frame = torch.rand(2, 3, 96, 80, device="cuda"), tree_map(there, frame)
        with _Elsewhere() as elsewhere:
            masks, valid = prior.segment(images, frame)
        assert masks.shape == (2, 6, 96, 80) and masks.is_cuda and valid.is_cuda
        assert elsewhere.num > 500 and not elsewhere.found
        assert (elsewhere.halves > 0) == (dtype is not None)  # the encoder's, by autocast
        with pytest.raises(DataDependentOutputException):
            valid.any().item()


def test_no_gradient_and_no_influence_of_the_training_steps_precision():
    sam, images = tiny_sam(), as_images([picture()]).requires_grad_()
    prior = AutomaticMasks(sam, num_masks=20, **LOOSE)
    found = prior(images)
    with torch.autocast("cpu", torch.bfloat16):
        again = prior(images)
    assert torch.equal(found.masks, again.masks) and not found.masks.requires_grad
    assert not sam.training and not any(p.requires_grad for p in sam.parameters())


def test_a_picture_that_is_not_finite_has_no_masks_and_harms_no_other():
    images = as_images([picture(), picture()])
    prior = AutomaticMasks(tiny_sam(), num_masks=20, **LOOSE)
    want = prior(images)
    images[1, 0, 3, 4] = torch.nan
    found = prior(images)
    assert found.counts().tolist() == [want.counts()[0], 0] and not found.masks[1].any()
    assert torch.equal(found.masks[0], want.masks[0])
    strict = AutomaticMasks(tiny_sam(), num_masks=20, pred_iou_thresh=9.0, points_per_side=3)
    assert strict(torch.zeros(1, 3, 40, 40)).counts().tolist() == [0]
