"""track.tensorboard: what TensorBoard's own reader finds in the files of a run."""

import io
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_train.config import RunConfig
from dist_train.track import Tracker, read_metrics

pytestmark = pytest.mark.unit


def make_run(out: Path) -> RunConfig:
    tree = {"name": "r", "out": str(out), "data": {"train": "shards"}, "optim": {"steps": 6, "global_batch": 8}}
    return RunConfig.model_validate({**tree, "track": {"progress": False, "tensorboard": True}})


def record(run: RunConfig, steps: range, *, scale: float, resume_step: int = 0) -> None:
    with Tracker(run, resume_step=resume_step, extra={"commit": "abc"}) as tracker:
        for step in steps:
            tracker.log(step, {"loss/total": scale / step})
            tracker.log(step, {"val/rgb/psnr/student": 30.0 + step})
            tracker.pictures(step, lambda: {"val/a": np.full((4, 6, 3), (255, 0, 0), np.uint8)})


def test_a_resumed_run_has_each_step_once_with_the_value_on_record(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run(tmp_path)
    record(run, range(1, 5), scale=1.0)  # ends at 4, while its last checkpoint is of step 2
    record(run, range(3, 7), scale=2.0, resume_step=2)
    found = EventAccumulator(str(run.dir / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == {"loss/total", "val/rgb/psnr/student"}
    told = [(event.step, event.value) for event in found.Scalars("loss/total")]
    assert told == [(line["step"], pytest.approx(line["loss/total"])) for line in read_metrics(run.dir)]
    assert [value for _, value in told] == pytest.approx([1, 0.5, 2 / 3, 0.5, 0.4, 1 / 3])
    (*_, last) = found.Images("pictures/val/a")
    picture = Image.open(io.BytesIO(last.encoded_image_string))
    assert last.step == 6 and picture.size == (6, 4) and picture.getpixel((0, 0)) == (255, 0, 0)
    (text,) = [event.tensor_proto.string_val[0].decode() for event in found.Tensors("run/text_summary")][-1:]
    assert '"commit": "abc"' in text and '"steps": 6' in text


def test_what_stops_tensorboard_does_not_stop_the_run(tmp_path, caplog):
    run = make_run(tmp_path)
    run.dir.mkdir()
    (run.dir / "tensorboard").write_text("a file in its place")
    with caplog.at_level(logging.WARNING):
        record(run, range(1, 3), scale=1.0)
    assert caplog.text.count("TensorBoard stopped") == 1 and "metrics.jsonl" in caplog.text
    assert [line["step"] for line in read_metrics(run.dir)] == [1, 2]


def test_missing_tensorboard_is_a_clear_error_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match=r"pip install 'restill\[tensorboard\]', or set track.tensorboard=false"):
        Tracker(make_run(tmp_path))
