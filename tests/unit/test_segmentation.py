"""Cityscapes' labels, scores of class maps, ESPNet and HRNet by their official weights, and the command."""

import json
import zlib

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.config import RunConfig
from dist_train.export import write_export
from dist_train.metrics import psnr, to_u8
from dist_train.nets import build_net
from dist_train.segmentation import espnet, load_segmenter, segment
from dist_train.segmentation.cityscapes import CLASSES, IGNORE, find_frames, paint, read_labels
from dist_train.segmentation.espnet import EspNet
from dist_train.segmentation.hrnet import build_hrnet
from dist_train.segmentation.scores import confusion, per_class, scores
from launch import segment as command
from shards.codec import decode_rgb, encode_png
from tests.helpers.nets import TINY_NETS
from tests.helpers.shared import shared

pytestmark = pytest.mark.unit


def random_labels(seed: int, *, height: int = 32, width: int = 64, classes: int = 19) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, (height, width), dtype=np.uint8)
    labels[rng.random((height, width)) < 0.2] = IGNORE
    return labels


def test_labels_in_all_their_forms_are_the_same(tmp_path):
    labels = random_labels(0)
    ids = np.array([one.id for one in CLASSES] + [0] * 237, np.uint8)[labels]
    ids[labels == IGNORE] = np.resize([0, 5, 9, 18, 29, 255], (labels == IGNORE).sum())
    folder = tmp_path / "gtFine" / "town"
    folder.mkdir(parents=True)
    cv2.imwrite(str(folder / "a_gtFine_color.png"), np.dstack([paint(labels)[..., ::-1], np.full(labels.shape, 255)]))
    cv2.imwrite(str(folder / "a_gtFine_labelIds.png"), ids)
    cv2.imwrite(str(folder / "a_gtFine_labelTrainIds.png"), labels)
    cv2.imwrite(str(folder / "a_gtFine_instanceIds.png"), labels)
    for name in ("color", "labelIds", "labelTrainIds"):
        np.testing.assert_array_equal(read_labels(folder / f"a_gtFine_{name}.png"), labels)
    (tmp_path / "town").mkdir()
    cv2.imwrite(str(tmp_path / "town" / "a_leftImg8bit.png"), np.zeros((32, 64, 3)))
    assert [(one.key, one.labels.name) for one in find_frames(tmp_path / "town", tmp_path / "gtFine")] == [
        ("a", "a_gtFine_labelTrainIds.png")
    ]
    # What is not Cityscapes' is refused, each form by its own rule.
    cv2.imwrite(str(folder / "b.png"), np.full((2, 2), 19, np.uint8))
    with pytest.raises(ValueError, match="train id 19 is none"):
        read_labels(folder / "b.png")
    cv2.imwrite(str(folder / "b.png"), np.full((2, 2, 3), (3, 2, 1), np.uint8))
    with pytest.raises(ValueError, match="colour #010203 is none"):
        read_labels(folder / "b.png")
    cv2.imwrite(str(tmp_path / "town" / "c_leftImg8bit.png"), np.zeros((32, 64, 3)))
    with pytest.raises(ValueError, match=r"1 of 2 frames have no labels.*c_gtFine_"):
        find_frames(tmp_path / "town", tmp_path / "gtFine")


def test_scores_are_those_of_torchmetrics_and_of_their_definitions():
    metrics = pytest.importorskip("torchmetrics.classification")
    labels = [random_labels(seed, classes=classes) for seed, classes in ((1, 12), (2, 17))]
    found = [np.where(random_labels(5) < 12, one, 3).astype(np.uint8) for one in labels]
    for one in found:
        one[one == IGNORE] = 7
    counts = [confusion(*pair) for pair in zip(found, labels, strict=True)]
    ours = scores(counts)
    wanted, given = (torch.from_numpy(np.stack(maps).astype(np.int64)) for maps in (labels, found))
    for metric, name, average in (
        (metrics.MulticlassJaccardIndex(19, ignore_index=IGNORE), "iou", "macro"),
        (metrics.MulticlassJaccardIndex(19, ignore_index=IGNORE, average="micro"), "iou", "micro"),
        (metrics.MulticlassAccuracy(19, ignore_index=IGNORE, average="micro"), "pa", "micro"),
        (metrics.MulticlassAccuracy(19, ignore_index=IGNORE), "pa", "macro"),
        (metrics.MulticlassF1Score(19, ignore_index=IGNORE), "dice", "macro"),
        (metrics.MulticlassF1Score(19, ignore_index=IGNORE, average="micro"), "dice", "micro"),
    ):
        assert ours[name][average] == pytest.approx(float(metric(given, wanted)), abs=1e-6), (name, average)
    for name in ours:
        alone = [scores([one])[name]["macro"] for one in counts]
        assert ours[name]["per_image"] == pytest.approx(np.mean(alone)) != pytest.approx(ours[name]["macro"])
    iou = per_class(sum(counts))["iou"]
    np.testing.assert_allclose(per_class(sum(counts))["dice"], 2 * iou / (1 + iou))
    assert np.isnan(iou[17:]).all()
    assert np.isnan(scores([0 * counts[0]])["iou"]["micro"])
    with pytest.raises(ValueError, match="labels are 64x32, the frame 64x30"):
        confusion(found[0][:30], labels[0])


def test_espnet_of_the_official_weights_segments_a_real_frame():
    """0.939 and 0.516 are what its own program's way gives: 20 classes, half the size, pixels repeated."""
    segmenter = load_segmenter(shared("weights", "espnet_p_2_q_8.pth"), "cpu")
    assert segmenter.title == "ESPNet p2 q8"
    folder = shared("data", "cityscapes")
    (frame,) = find_frames(folder, folder)
    rgb_u8, labels = decode_rgb(frame.picture.read_bytes()), read_labels(frame.labels)
    picture = torch.from_numpy(rgb_u8).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        half = segmenter.net(F.interpolate(picture, (512, 1024), mode="bilinear"))[0].argmax(0).numpy()
    found, labelled = half.repeat(2, 0).repeat(2, 1), labels != IGNORE
    assert (found == labels)[labelled].mean() == pytest.approx(0.939, abs=5e-4)
    iou = [((found == c) & (labels == c)).sum() / (((found == c) | (labels == c)) & labelled).sum()
           for c in np.unique(labels[labelled])]  # fmt: skip
    assert np.mean(iou) == pytest.approx(0.516, abs=5e-4)
    ours = scores([confusion(segment(segmenter.net, rgb_u8), labels)])
    assert ours["pa"]["micro"] == pytest.approx(0.943, abs=5e-4)  # finer edges, and never the 20th class


class Official:
    """HRNet-Semantic-Segmentation's `seg_hrnet`, written out: makes its weights as it goes, under their names."""

    def __init__(self, width: int, *, align_corners: bool):
        self.state: dict[str, Tensor] = {}
        self.width, self.align_corners = width, align_corners

    def conv(self, x: Tensor, name: str, norm: str, c_out: int, *, kernel: int = 3, stride: int = 1) -> Tensor:
        weight = self.made(f"{name}.weight", lambda: torch.randn(c_out, x.shape[1], kernel, kernel) / 10)
        self.made(f"{norm}.num_batches_tracked", lambda: torch.tensor(1))
        mean, bias = (self.made(f"{norm}.{one}", lambda: torch.randn(c_out) / 10) for one in ("running_mean", "bias"))
        var, scale = (self.made(f"{norm}.{one}", lambda: torch.rand(c_out) + 0.5) for one in ("running_var", "weight"))
        x = F.conv2d(x, weight, stride=stride, padding=kernel // 2)
        return F.batch_norm(x, mean, var, scale, bias)

    def made(self, name: str, make) -> Tensor:
        return self.state.setdefault(name, make()) if name not in self.state else self.state[name]

    def grow(self, x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=self.align_corners)

    def basic(self, x: Tensor, name: str) -> Tensor:
        c = x.shape[1]
        inner = self.conv(x, f"{name}.conv1", f"{name}.bn1", c).relu()
        return (x + self.conv(inner, f"{name}.conv2", f"{name}.bn2", c)).relu()

    def bottleneck(self, x: Tensor, name: str) -> Tensor:
        inner = self.conv(x, f"{name}.conv1", f"{name}.bn1", 64, kernel=1).relu()
        inner = self.conv(inner, f"{name}.conv2", f"{name}.bn2", 64).relu()
        inner = self.conv(inner, f"{name}.conv3", f"{name}.bn3", 256, kernel=1)
        shortcut = (
            x if x.shape[1] == 256 else self.conv(x, f"{name}.downsample.0", f"{name}.downsample.1", 256, kernel=1)
        )
        return (shortcut + inner).relu()

    def module(self, xs: list[Tensor], name: str) -> list[Tensor]:
        for i in range(len(xs)):
            for block in range(4):
                xs[i] = self.basic(xs[i], f"{name}.branches.{i}.{block}")
        fused = []
        for i, out in enumerate(xs):
            total = torch.zeros_like(out)
            for j, x in enumerate(xs):
                fuse = f"{name}.fuse_layers.{i}.{j}"
                if j > i:
                    x = self.grow(self.conv(x, f"{fuse}.0", f"{fuse}.1", out.shape[1], kernel=1), out)
                for k in range(i - j):
                    last = k == i - j - 1
                    c_out = out.shape[1] if last else x.shape[1]
                    x = self.conv(x, f"{fuse}.{k}.0", f"{fuse}.{k}.1", c_out, stride=2)
                    x = x if last else x.relu()
                total = total + x
            fused.append(total.relu())
        return fused

    def __call__(self, x: Tensor) -> Tensor:
        w = self.width
        full = x
        for n in (1, 2):
            x = self.conv(x, f"conv{n}", f"bn{n}", 64, stride=2).relu()
        for block in range(4):
            x = self.bottleneck(x, f"layer1.{block}")
        xs = [
            self.conv(x, "transition1.0.0", "transition1.0.1", w).relu(),
            self.conv(x, "transition1.1.0.0", "transition1.1.0.1", 2 * w, stride=2).relu(),
        ]
        for stage, modules in ((2, 1), (3, 4), (4, 3)):
            if stage > 2:
                name = f"transition{stage - 1}.{stage - 1}.0"
                xs.append(self.conv(xs[-1], f"{name}.0", f"{name}.1", 2 ** (stage - 1) * w, stride=2).relu())
            for module in range(modules):
                xs = self.module(xs, f"stage{stage}.{module}")
        x = torch.cat([xs[0], *(self.grow(one, xs[0]) for one in xs[1:])], 1)
        bias = self.made("last_layer.0.bias", lambda: torch.randn(15 * w) / 10)
        weight = self.made("last_layer.0.weight", lambda: torch.randn(15 * w, 15 * w, 1, 1) / 10)
        x = F.conv2d(x, weight, bias)
        one = torch.ones(15 * w)
        stats = {"running_mean": 0 * one, "running_var": 2 * one, "weight": one, "bias": 0 * one}
        self.state |= {f"last_layer.1.{name}": value for name, value in stats.items()}
        self.state["last_layer.1.num_batches_tracked"] = torch.tensor(1)
        x = F.batch_norm(x, *stats.values()).relu()
        weight = self.made("last_layer.3.weight", lambda: torch.randn(19, 15 * w, 1, 1) / 10)
        return self.grow(F.conv2d(x, weight, self.made("last_layer.3.bias", lambda: torch.randn(19))), full)


@pytest.mark.parametrize("align_corners", [True, False])
def test_hrnet_of_an_official_file_is_the_official_net(tmp_path, align_corners):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    official = Official(18, align_corners=align_corners)
    picture = torch.rand(1, 3, 64, 96)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.inference_mode():
        wanted = official((picture - mean) / std)
    file = tmp_path / "hrnet_cs.pth"  # as its trainer saves it: the net in a wrapper, beside the loss
    torch.save({f"model.{k}": v for k, v in official.state.items()} | {"loss.criterion.weight": torch.ones(19)}, file)
    segmenter = load_segmenter(file, "cpu", align_corners=align_corners)
    assert segmenter.title == "HRNetV2-W18"
    with torch.inference_mode():
        given = segmenter.net(picture)
    assert given.std() > 0.1
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    back = segmenter.net.state_dict()
    assert back.keys() == official.state.keys()
    for name, value in official.state.items():
        assert name.endswith("num_batches_tracked") or torch.equal(back[name], value), name
    assert segment(segmenter.net, np.zeros((33, 65, 3), np.uint8)).shape == (33, 65)


def test_other_files_are_refused_by_what_they_are(tmp_path):
    file = tmp_path / "x.pth"
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, file)
    with pytest.raises(ValueError, match="wanted ESPNet or an HRNetV2 .* found torchvision's VGG"):
        load_segmenter(file, "cpu")
    torch.save(EspNet(p=1, q=1, classes=5).state_dict(), file)
    with pytest.raises(ValueError, match="has 5 classes, Cityscapes 19"):
        load_segmenter(file, "cpu")
    with pytest.raises(ValueError, match="no HRNetV2 of width 17"):
        build_hrnet(17)


def test_the_command_degrades_restores_and_scores_every_frame(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(espnet, "SIZE_PX", (32, 64))
    torch.manual_seed(0)
    torch.save(EspNet(p=1, q=1).state_dict(), tmp_path / "esp.pth")
    config = RunConfig.model_validate({"name": "r", "data": {"train": "-"}, "student": TINY_NETS["nafnet"]}).student
    net = build_net(config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    write_export(net, tmp_path / "net.safetensors", config=config, facts={"scores": {}})
    frames = tmp_path / "frames"
    frames.mkdir()
    rng = np.random.default_rng(0)
    for key in ("a", "b"):
        picture = rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)
        (frames / f"{key}_leftImg8bit.png").write_bytes(encode_png(picture))
        (frames / f"{key}_gtFine_color.png").write_bytes(encode_png(paint(random_labels(ord(key)))))
    given = [str(tmp_path / "esp.pth"), "--frames", str(frames), "--labels", str(frames), "--restored-by",
             str(tmp_path / "net.safetensors"), "--pictures", "1", "--out"]  # fmt: skip
    noisy = [*given, str(tmp_path / "1"), "--degrade", "noise_gaussian"]
    assert command.main(noisy) == 0
    assert "restored" in capsys.readouterr().out
    first = json.loads((tmp_path / "1" / "segment.json").read_text())
    assert list(first["rows"]) == ["clean", "degraded", "restored"] and list(first["pictures"]["clean"]) == ["a", "b"]
    assert first["rows"]["clean"]["psnr_rgb"] is None
    assert [path.name for path in (tmp_path / "1").glob("*.png")] == ["a.png"]

    # The same by hand, from the degraded pictures of a second call that gets them from a folder.
    segmenter = load_segmenter(tmp_path / "esp.pth", "cpu")
    counts, psnrs, restored = [], [], []
    for key in ("a", "b"):
        clean = decode_rgb((frames / f"{key}_leftImg8bit.png").read_bytes())
        chance = np.random.Generator(np.random.Philox(key=[0, zlib.crc32(key.encode())]))
        degraded = command.DEGRADATIONS["noise_gaussian"].make(clean, chance)
        (tmp_path / "noisy").mkdir(exist_ok=True)
        (tmp_path / "noisy" / f"{key}_leftImg8bit.png").write_bytes(encode_png(degraded))
        counts.append(confusion(segment(segmenter.net, degraded), random_labels(ord(key))))
        psnrs.append(psnr(degraded, clean))
        with torch.inference_mode():
            out = net.eval()(torch.from_numpy(degraded).permute(2, 0, 1)[None].float() / 255)[0]
        restored.append(psnr(to_u8(out), clean))
    assert first["rows"]["degraded"] == {"psnr_rgb": pytest.approx(np.mean(psnrs)), **scores(counts)}
    assert first["rows"]["restored"]["psnr_rgb"] == pytest.approx(np.mean(restored), abs=1e-3)
    assert command.main([*given, str(tmp_path / "2"), "--degraded", str(tmp_path / "noisy")]) == 0
    second = json.loads((tmp_path / "2" / "segment.json").read_text())
    assert second["rows"] == first["rows"] and second["classes"] == first["classes"]
    (tmp_path / "noisy" / "b_leftImg8bit.png").unlink()
    assert command.main([*given, str(tmp_path / "3"), "--degraded", str(tmp_path / "noisy")]) == 2
    assert "has no frame b" in capsys.readouterr().err
