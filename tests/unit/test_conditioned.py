"""Students that see masks: groups of masks, MAP against a loop, mask dropout, any net, and commands that run them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from dist_train.config import ConditioningConfig, NafnetConfig, NetConfig, RunConfig, StoredConfig
from dist_train.data.batch import Batch
from dist_train.data.reader import ShardReader
from dist_train.evaluate import evaluate, means
from dist_train.export import write_export
from dist_train.load import load_net, start_from
from dist_train.nets import SeesMasks, build_conditioned, build_net
from dist_train.nets.conditioned import ConditionedNafnet, Groups, drop_groups, grey_values, group_average, group_masks
from dist_train.nets.nafnet import Nafnet
from dist_train.priors import Priors, prior_for
from dist_train.priors.masks import MaskSet
from dist_train.tasks import build_task, sample_flops
from dist_train.tasks.conditioned import ConditionedTask
from launch import before_after, restore
from launch import evaluate as evaluate_command
from launch import export as export_command
from launch.bench.pooling import WAYS, Pooling, prepare
from shards.masks import add_masks
from tests.helpers.nets import TINY_NETS
from tests.helpers.pairs import write_pairs
from tests.helpers.rectangles import ColourPrior, colour_masks, make_rectangles
from tests.helpers.tasks import tiny_run

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
COLOURS = Priors(ColourPrior(6))
MAP, CAT = ConditioningConfig(), ConditioningConfig(method="cat")
NAFNET = NafnetConfig(width=4, enc_blk_nums=(1, 1), dec_blk_nums=(1, 1))


def shaken(net: SeesMasks) -> SeesMasks:
    """As if trained a little, so that all it is given reaches its output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net


def some_masks(*shape: int, num_valid: tuple[int, ...] = (5, 2)) -> MaskSet:
    """Masks that overlap, of several pictures, each with its own number of valid ones."""
    masks = torch.rand(len(num_valid), *shape, generator=torch.Generator().manual_seed(0)) < 0.3
    return MaskSet(masks, torch.arange(shape[0]) < torch.tensor(num_valid)[:, None])


def official_average(features: Tensor, masks: list[Tensor]) -> Tensor:
    """Picture by picture, mask by mask, as the official code does it."""
    pictures = []
    for feature, of_picture in zip(features, masks, strict=True):
        out = torch.zeros_like(feature)
        for mask in (*of_picture, 1 - sum(of_picture).clamp(0, 1)):  # type: ignore[union-attr]
            out = out + (feature * mask).sum((1, 2), keepdim=True) / (mask.sum() + 1e-8) * mask
        pictures.append(out)
    return torch.stack(pictures)


@pytest.mark.parametrize("value", [1.0, 1 / 255])
@pytest.mark.parametrize("covered", [True, False])
def test_map_equals_a_loop_over_pictures_and_masks_and_so_does_its_gradient(value: float, covered: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 2, 23, 17, generator=generator, requires_grad=True)
    ids = torch.randint(int(covered), 8, (3, 23, 17), generator=generator)
    ids[0] %= 4  # M is each picture's own
    if covered:
        ids[0] += ids[0] == 0
    masks = [value * torch.stack([(of_b == k).float() for k in of_b.unique() if k]) for of_b in ids]
    assert len(masks[0]) == 3 and len(masks[1]) == 7
    upstream = torch.randn(features.shape, generator=generator)
    values, gradients = [], []
    for pooled in (group_average(features, Groups(ids, 9), value=value), official_average(features, masks)):
        values.append(pooled)
        gradients.append(torch.autograd.grad(pooled, features, upstream)[0])
    torch.testing.assert_close(*values, atol=1e-6, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(group_average(features, Groups(ids, 9), value=value), values[0])


def test_a_large_picture_is_averaged_as_exactly() -> None:
    features = 1 + torch.rand(1, 1, 720, 1280, generator=torch.Generator().manual_seed(0))
    pooled = group_average(features, Groups(torch.ones(1, 720, 1280, dtype=torch.int64), 1))
    assert abs(pooled[0, 0, 0, 0].item() - features.double().mean().item()) < 1e-6


def test_grey_groups_are_the_official_preparation_s() -> None:
    masks = some_masks(140, 9, 11, num_valid=(140, 2))
    groups = group_masks(masks, "grey")
    for of_picture, valid, ids in zip(masks.masks, masks.valid, groups.ids, strict=True):
        grey = np.zeros((9, 11), int)
        for i, mask in enumerate(of_picture[valid].numpy()):
            grey[mask] += 2 * (i + 1) if i < 127 else 2 * (255 - i) - 1
        assert np.array_equal(ids - 1, grey.clip(0, 255))
    assert groups.num == 256 and 1 <= groups.ids.min() and groups.ids.max() <= 256
    assert len(grey_values(254, device=CPU).unique()) == 254


def test_idmap_groups_are_the_smallest_masks_and_what_has_none() -> None:
    masks = torch.zeros(1, 3, 4, 6, dtype=torch.bool)
    masks[0, 0], masks[0, 1, :, :3], masks[0, 2, 1:3, 1:3] = False, True, True
    masks[0, 0, :, :5] = True
    groups = group_masks(MaskSet(masks, torch.ones(1, 3, dtype=torch.bool)), "idmap")
    assert groups.num == 4 and groups.ids[0, 1].tolist() == [3, 4, 4, 2, 2, 1]


def test_of_the_groups_that_are_there_an_exact_number_is_dropped() -> None:
    ids = torch.tensor([[[1, 1, 3, 7]], [[2, 2, 2, 0]], [[5, 6, 7, 4]]])
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(b)) for b in range(3)])
    for share in (0.0, 0.5, 0.7, 1.0):
        left = drop_groups(Groups(ids, 7), order=order, share=share).ids
        for of_picture, kept, ranks in zip(ids, left, order, strict=True):
            there = set(of_picture.unique().tolist()) - {0}
            first = [k + 1 for k in ranks.tolist() if k + 1 in there][: math.floor(share * len(there))]
            assert torch.equal(kept, of_picture * ~torch.isin(of_picture, torch.tensor(first, dtype=torch.int64)))


@pytest.mark.parametrize("grouping", ["grey", "idmap"])
def test_cat_is_a_grey_picture_and_zero_where_padded(grouping: Any) -> None:
    net = shaken(build_conditioned(NAFNET, ConditioningConfig(method="cat", grouping=grouping)))
    assert isinstance(net, ConditionedNafnet)
    lq, masks = torch.rand(2, 3, 13, 10), some_masks(5, 13, 10)
    if grouping == "grey":
        grey = group_masks(masks, "grey").ids - 1
    else:
        values = torch.tensor([0, 2, 4, 6, 8, 10])
        grey = values[masks.idmap()]
    official = Nafnet.forward(net, torch.cat([lq, grey[:, None] / 255], 1))
    torch.testing.assert_close(net(lq, masks), official, atol=1e-6, rtol=0)


def test_what_is_padded_is_in_no_group_as_in_the_official_net() -> None:
    net = shaken(build_conditioned(NAFNET, MAP))
    assert isinstance(net, ConditionedNafnet)
    lq, groups = torch.rand(1, 3, 5, 6), Groups(torch.randint(0, 4, (1, 5, 6)), 3)
    padded = Groups(torch.nn.functional.pad(groups.ids, (0, 2, 0, 3)), 3)
    larger = net.restore_groups(torch.nn.functional.pad(lq, (0, 2, 0, 3)), padded)[..., :5, :6]
    torch.testing.assert_close(net.restore_groups(lq, groups), larger, atol=1e-6, rtol=0)


@pytest.mark.parametrize("conditioning", [MAP, CAT], ids=["map", "cat"])
@pytest.mark.parametrize("name", [name for name in TINY_NETS if name != "nafnet"])
def test_any_net_starts_as_without_masks_and_learns_of_them(name: str, conditioning: ConditioningConfig) -> None:
    config = TypeAdapter(NetConfig).validate_python(TINY_NETS[name])
    torch.manual_seed(0)
    plain = build_net(config).eval()
    torch.manual_seed(0)
    net = build_conditioned(config, conditioning).eval()
    lq, masks = torch.rand(1, 3, 24, 20), some_masks(3, 24, 20, num_valid=(3,))
    assert net.wants_masks and not getattr(plain, "wants_masks", False)
    net.get_submodule("net").load_state_dict(plain.state_dict())
    out = net(lq, masks)
    assert torch.equal(out, plain(lq))
    out.square().sum().backward()
    gradient = net.get_parameter("front.weight").grad
    assert gradient is not None and gradient[:, 3:].abs().max() > 0
    shaken(net)
    assert not torch.equal(net(lq, masks), net(lq, MaskSet(masks.masks, ~masks.valid)))


def conditioned_run(**sections: Any) -> RunConfig:
    return tiny_run(task="conditioned", **{"conditioning": {"method": "map"}, **sections})


def some_batch(num: int, start: int = 0) -> Batch:
    """Pictures of known colours at positions in the stream."""
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    pictures = [
        colours[torch.randint(0, 4, (4, 4), generator=torch.Generator().manual_seed(start + p))] for p in range(num)
    ]
    lq = torch.stack(pictures).repeat_interleave(4, 1).repeat_interleave(4, 2).permute(0, 3, 1, 2).contiguous()
    batch = Batch.of_images(lq, 1 - lq)
    return Batch(**{**batch.__dict__, "positions": torch.arange(start, start + num)})


def test_masks_are_dropped_in_training_alone_by_seed_and_position() -> None:
    seen: list[int] = []

    def task_of(**sections: Any) -> ConditionedTask:
        task = build_task(conditioned_run(**sections))
        assert isinstance(task, ConditionedTask)
        shaken(task.student)
        inner = task.student.channels
        task.student.channels = lambda image, groups: (seen.append(groups.ids), inner(image, groups))[1]  # type: ignore
        return task

    def losses(task: ConditionedTask, *batches: Batch) -> Tensor:
        seen.clear()
        rows = [task(batch, COLOURS)["total"] for batch in batches]
        return torch.stack(rows).mean()

    task, whole = task_of(), some_batch(4)
    halves = (some_batch(2), some_batch(2, start=2))
    of_four = losses(task, whole)
    (ids,) = seen
    for picture, dropped in zip(ColourPrior(6)(whole.lq).masks, ids, strict=True):
        num = sum(1 for mask in picture if mask.any())
        assert len(dropped.unique()) == 1 + num - num // 2 and (dropped == 0).any()
    of_two = losses(task, *halves)
    assert torch.equal(ids, torch.cat(seen))
    torch.testing.assert_close(of_four, of_two)
    losses(task, some_batch(4), Batch(**{**whole.__dict__, "positions": whole.positions + 4}))
    assert not torch.equal(seen[0], seen[1])
    losses(task_of(seed=1), whole)
    assert not torch.equal(seen[0], ids)
    for quiet in (task.eval(), task_of(conditioning={"method": "map", "mask_dropout": 0})):
        losses(quiet, whole)
        assert len(seen) == 1 and (seen[0] > 0).all()
    seen.clear()
    task.eval().restore(whole, COLOURS)
    assert (seen[0] > 0).all()


def test_the_loss_is_the_plain_one_s_and_the_log_tells_of_masks() -> None:
    run = conditioned_run(prior={"name": "regions", "num_masks": 6, "scale": 50.0, "min_area_px": 16})
    task = build_task(run)
    terms = task(some_batch(2), COLOURS)
    assert terms.keys() == {"student_rec", "total", "masks_per_picture", "mask_coverage"}
    assert terms["total"] is terms["student_rec"] and terms["mask_coverage"] == 1
    plain = build_task(tiny_run(task="plain"))
    assert sample_flops(task, run, CPU) > sample_flops(plain, run, CPU)
    with torch.device("meta"):
        assert sample_flops(build_task(run), run, torch.device("meta")) == sample_flops(task, run, CPU)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"task": "conditioned"}, "goes with a section `conditioning`"),
        ({"task": "plain", "conditioning": {"method": "cat"}}, "no other task does"),
        ({"task": "conditioned", "conditioning": {"method": "map"}, "prior": {"name": "none"}}, "gives none"),
        ({"task": "conditioned", "conditioning": {"method": "cat", "mask_dropout": 0.3}}, "is for method=map"),
        ({"task": "conditioned", "conditioning": {"mask_value": 255.0}}, "must not be above 1"),
        ({"task": "conditioned", "conditioning": {"maskdropout": 0}}, "did you mean mask_dropout?"),
        ({"student": {"name": "nafnet", "extra_channels": 1}}, "set task=conditioned"),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_run(**sections)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of known colours, with the masks of their colours, and of their left half, beside them in `masked`."""
    folder = tmp_path_factory.mktemp("shards")
    write_pairs(make_rectangles(folder / "src", 3), folder / "plain")
    note: dict[str, Any] = {"of": "lq", "prior": ColourPrior().describe()}
    add_masks(folder / "plain", folder / "masked", lambda lq, gt: colours_and_half(lq), **note)
    return folder


def colours_and_half(rgb: np.ndarray) -> np.ndarray:
    left = np.zeros((1, *rgb.shape[:2]), bool)
    left[..., : rgb.shape[1] // 2] = True
    return np.concatenate([colour_masks(rgb), left])


def exported(folder: Path, run: RunConfig) -> tuple[SeesMasks, Path]:
    """A student as a run would export it."""
    assert run.conditioning is not None
    torch.manual_seed(0)
    net = shaken(build_conditioned(run.student, run.conditioning)).eval()
    conditioning = run.conditioning.model_dump(mode="json")
    facts = {"conditioning": conditioning, "config": run.model_dump(mode="json"), "scores": {}, "step": 1}
    write_export(net, folder / "student.safetensors", config=run.student, facts=facts)
    return net, folder / "student.safetensors"


def psnr_of(path: Path) -> float:
    return json.loads(path.read_text())["means"]["val/rgb/psnr/student"]


def test_a_conditioned_student_is_scored_with_the_masks_it_was_trained_with(shards: Path, tmp_path: Path) -> None:
    run = conditioned_run(prior={"name": "stored", "num_masks": 6})
    net, weights = exported(tmp_path, run)
    reader = ShardReader(shards / "masked")
    prior = prior_for(StoredConfig(num_masks=6), reader.masks_note, CPU, where=reader.folder)
    task = ConditionedTask(net, run.loss, seed=0).eval()
    in_training = means(evaluate(lambda b: task.restore(b, Priors(prior)), reader, protocols=["rgb"], device=CPU))
    report = tmp_path / "report.json"
    command = [str(weights), str(shards / "masked"), "--protocol", "rgb", "--device", "cpu", "--json", str(report)]
    assert evaluate_command.main(command) == 0
    assert psnr_of(report) == pytest.approx(in_training["val/rgb/psnr/student"], abs=1e-4)
    assert evaluate_command.main([*command, "--prior", "regions", "--with", "num_masks=6", "min_area_px=16"]) == 0
    assert abs(psnr_of(report) - in_training["val/rgb/psnr/student"]) > 1e-3
    assert before_after.main([str(weights), str(shards / "masked"), str(tmp_path / "drawn.png")]) == 0


def test_an_official_file_takes_masks_and_their_scale_from_the_command_line(shards: Path, tmp_path: Path) -> None:
    _, weights = exported(tmp_path, conditioned_run(prior={"name": "stored"}))
    assert export_command.main([str(weights), str(tmp_path / "seg.pth")]) == 0
    report, scores = tmp_path / "report.json", {}
    for more in ([], ["--net", "mask_value=0.00392156862745098"], ["--net", "grouping=idmap"]):
        command = [str(tmp_path / "seg.pth"), str(shards / "masked"), "--device", "cpu", "--json", str(report), *more]
        assert evaluate_command.main(command) == 0
        scores[" ".join(more)] = psnr_of(report)
    assert evaluate_command.main([str(weights), str(shards / "masked"), "--device", "cpu", "--json", str(report)]) == 0
    assert psnr_of(report) == pytest.approx(scores[""], abs=1e-4) and len(set(scores.values())) == 3
    again = tmp_path / "again.safetensors"
    assert export_command.main([str(tmp_path / "seg.pth"), str(again), "--net", "grouping=idmap"]) == 0
    assert load_net(again, {}, masks=True)[1]["conditioning"]["grouping"] == "idmap"


def test_who_has_no_masks_is_told_so(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, weights = exported(tmp_path, conditioned_run(prior={"name": "stored"}))
    plain, masked = str(shards / "plain"), str(shards / "masked")
    for main, command, words in [
        (restore.main, [str(weights), "a.png", "b.png"], "wants masks beside the picture"),
        (evaluate_command.main, [str(weights), plain, "--device", "cpu"], "--prior regions"),
        (evaluate_command.main, [str(weights), masked, "--tile", "64", "--device", "cpu"], "whole pictures"),
        (evaluate_command.main, [str(weights), masked, "--with", "a=1", "--device", "cpu"], "--with goes with --prior"),
    ]:
        assert main(command) == 2
        assert words in capsys.readouterr().err


def test_a_student_starts_from_one_of_its_kind_or_from_the_net_inside(tmp_path: Path) -> None:
    trained, weights = exported(tmp_path, conditioned_run())
    task = build_task(run := conditioned_run(init={"student": str(weights)}))
    start_from(task, run.init)
    student = task.get_submodule("student").state_dict()
    assert all(torch.equal(tensor, student[name]) for name, tensor in trained.state_dict().items())
    config = TypeAdapter(NetConfig).validate_python(TINY_NETS["efficientderain"])
    inside = tmp_path / "inside.safetensors"
    write_export(net := build_net(config), inside, config=config, facts={})
    task = build_task(run := conditioned_run(student=TINY_NETS["efficientderain"], init={"student": str(inside)}))
    start_from(task, run.init)
    held = task.get_submodule("student.net").state_dict()
    assert all(torch.equal(tensor, held[name]) for name, tensor in net.state_dict().items())


def test_the_ways_to_pool_that_the_bench_races_are_the_same() -> None:
    loop, *others = (prepare(Pooling(way, 3, 2, 16, 2, "cpu")).lap() for way in WAYS)
    for other in others:
        torch.testing.assert_close(other, loop, atol=1e-6, rtol=0)
