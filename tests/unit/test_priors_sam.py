import copy

import numpy as np
import pytest
import torch

from dist_train.config import SamConfig
from dist_train.priors import build_prior
from dist_train.priors.masks import MaskSet
from dist_train.priors.sam import SamPrior
from tests.helpers.tiny_sam import LOOSE, picture, tiny_sam

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def as_image(rgb_u8: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rgb_u8).permute(2, 0, 1)[None] / 255


def as_set(masks: MaskSet | list) -> set[bytes]:
    if isinstance(masks, MaskSet):
        return {mask.numpy().tobytes() for mask in masks.masks[0][masks.valid[0]]}
    return {record["segmentation"].tobytes() for record in masks if record["area"]}


def official_records(sam, rgb_u8: np.ndarray) -> list[dict]:
    from segment_anything import SamAutomaticMaskGenerator

    return SamAutomaticMaskGenerator(sam.eval(), **LOOSE).generate(rgb_u8)


def official(sam, rgb_u8: np.ndarray) -> set[bytes]:
    return as_set(official_records(sam, rgb_u8))


@pytest.mark.parametrize("generator", ["reference", "batched"])
def test_masks_are_those_of_the_official_generator_on_rgb(generator):
    want, from_bgr = official(tiny_sam(), picture()), official(tiny_sam(), picture()[..., ::-1].copy())
    assert len(want) >= 5 and want != from_bgr
    prior = SamPrior(tiny_sam(), SamConfig(generator=generator, dtype="fp32", num_masks=200, **LOOSE), weights="random")
    found = prior(as_image(picture()))
    assert as_set(found) == want
    areas = found.masks[0].sum((1, 2))
    assert torch.equal(areas, areas.sort(descending=True).values)


@pytest.mark.parametrize("generator", ["reference", "batched"])
def test_the_offset_of_the_stability_is_that_of_the_official_generator(generator):
    from segment_anything import SamAutomaticMaskGenerator

    def wanted(offset: float) -> set[bytes]:
        settings = {**LOOSE, "stability_score_thresh": 0.5, "stability_score_offset": offset}
        return as_set(SamAutomaticMaskGenerator(tiny_sam().eval(), **settings).generate(picture()))

    settings = {**LOOSE, "stability_score_thresh": 0.5}
    config = SamConfig(generator=generator, dtype="fp32", num_masks=200, stability_score_offset=1e-4, **settings)
    found = as_set(SamPrior(tiny_sam(), config, weights="random")(as_image(picture())))
    assert found == wanted(1e-4) != wanted(SamConfig().stability_score_offset)


@pytest.mark.parametrize("generator", ["reference", "batched"])
def test_auto_on_the_cpu_rounds_the_weights_as_a_gpu_would(generator):
    rounded = copy.deepcopy(tiny_sam())
    for parameter in rounded.parameters():
        parameter.data = parameter.data.half().float()
    prior = SamPrior(tiny_sam(), SamConfig(generator=generator, num_masks=200, **LOOSE), weights="random")
    assert as_set(prior(as_image(picture()))) == official(rounded, picture())
    assert prior.describe()["dtype"] == "fp32, weights rounded to fp16"


@pytest.mark.parametrize("generator", ["reference", "batched"])
def test_no_gradient_and_no_influence_of_the_training_steps_precision(generator):
    sam = tiny_sam()
    prior = SamPrior(sam, SamConfig(generator=generator, dtype="fp32", num_masks=200, **LOOSE), weights="random")
    image = as_image(picture()).repeat(2, 1, 1, 1).requires_grad_()
    found = prior(image)
    assert not found.masks.requires_grad and not any(p.requires_grad for p in sam.parameters()) and not sam.training
    with torch.autocast("cpu", torch.bfloat16):
        again = prior(image)
    assert torch.equal(found.masks, again.masks)
    assert torch.equal(found.masks[0], found.masks[1])


@pytest.mark.parametrize("generator", ["reference", "batched"])
def test_the_surest_masks_are_kept(generator):
    sure = SamConfig(generator=generator, dtype="fp32", num_masks=3, **LOOSE)
    prior = SamPrior(tiny_sam(), sure, weights="random")
    best = sorted(official_records(tiny_sam(), picture()), key=lambda record: record["predicted_iou"])[-3:]
    assert as_set(prior(as_image(picture()))) == as_set(best)


@pytest.mark.parametrize("generator", ["reference", "batched"])
def test_bf16_runs_and_nothing_found_is_no_masks(generator):
    prior = SamPrior(tiny_sam(), SamConfig(generator=generator, dtype="bf16", **LOOSE), weights="random")
    assert prior(as_image(picture())).counts().item() >= 5 and prior.describe()["dtype"] == "bf16"
    strict = SamPrior(tiny_sam(), SamConfig(generator=generator, **{**LOOSE, "pred_iou_thresh": 2.0}), weights="random")
    assert strict(as_image(picture())).counts().item() == 0


@pytest.mark.parametrize("generator", ["reference", "batched"])
def test_pictures_that_are_black_or_not_finite_do_no_harm(generator):
    prior = SamPrior(tiny_sam(), SamConfig(generator=generator, dtype="fp32", num_masks=8, **LOOSE), weights="random")
    good = as_image(picture())
    found = prior(
        torch.cat([good, torch.full_like(good, torch.nan), torch.zeros_like(good), good[..., :1].expand_as(good)])
    )
    assert torch.equal(found.masks[0], prior(good).masks[0]) and found.counts()[1] == 0
    assert prior(good[..., :4, :3]).masks.shape == (1, 8, 4, 3)  # smaller than a cell of points


def test_a_checkpoint_is_loaded_without_touching_the_global_generator(tmp_path, monkeypatch):
    import segment_anything

    def build():
        torch.rand(1)  # as initialising a real one would
        return tiny_sam(seed=3)

    monkeypatch.setattr(segment_anything, "sam_model_registry", {"vit_b": build})
    path = tmp_path / "sam.pth"
    torch.save(tiny_sam().state_dict(), path)
    before = torch.random.get_rng_state()
    prior = build_prior(SamConfig(model="vit_b", checkpoint=str(path), dtype="fp32", num_masks=200, **LOOSE), CPU)
    assert torch.equal(before, torch.random.get_rng_state())
    assert as_set(prior(as_image(picture()), None)) == official(tiny_sam(), picture())
    assert prior.describe()["weights"] == str(path) and len(prior.describe()["sha256"]) == 64


def test_wrong_or_missing_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"prior\.checkpoint.*prior\.download=true.*regions"):
        build_prior(SamConfig(), CPU)
    path = tmp_path / "vit_b.pth"
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}, path)
    with pytest.raises(ValueError, match="not the weights of SAM vit_h .* looks like SAM vit_b"):
        build_prior(SamConfig(model="vit_h", checkpoint=str(path)), CPU)
    with pytest.raises(ValueError, match="no such file"):
        build_prior(SamConfig(checkpoint=str(tmp_path / "absent.pth")), CPU)
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        SamPrior(tiny_sam(), SamConfig(dtype="fp16"), weights="random")
    with pytest.raises(ValueError, match="input_px=512 needs model: tiny_vit"):
        SamConfig(model="vit_b", input_px=512)
    with pytest.raises(ValueError, match="multiple of 16"):
        SamConfig(model="tiny_vit", input_px=1000)
