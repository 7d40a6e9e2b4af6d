"""What is said of a step that is skipped: the rank, the samples, and the loss or else the gradient that is to blame."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dist_train.data.batch import Batch
from dist_train.nonfinite import StepGuard
from dist_train.ranks import TrainingError
from tests.helpers.tasks import tiny_run

pytestmark = pytest.mark.unit


def a_batch(first: int) -> Batch:
    pictures = torch.rand(2, 3, 8, 8)
    return Batch(
        lq=pictures,
        gt=1 - pictures,
        keys=(f"s-{first}", f"s-{first + 1}"),
        positions=torch.tensor([first, first + 1]),
        geometry=torch.zeros(2, 4, dtype=torch.int64),
    )


class Net(nn.Module):
    """Its loss is finite and its gradient is not, as of a root at 0: first met at `late`, then in `early` below it."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Linear(2, 2), nn.Linear(2, 2)
        self.unharmed = nn.Parameter(torch.ones(1))

    def forward(self, scale: float) -> torch.Tensor:
        return (scale * self.late(self.early(torch.ones(1, 2)))).square().sum().sqrt() + self.unharmed.sum()


def step(guard: StepGuard, net: Net, scale: float) -> None:
    guard.begin()
    for first, of in ((0, 1.0), (2, scale)):
        loss = net(of)
        guard.see(a_batch(first), {"student_rec": loss, "total": loss})
        loss.backward()


def test_a_loss_names_itself_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = StepGuard(tiny_run(tmp_path), Net())
    guard.begin()
    guard.see(a_batch(4), {"student_rec": torch.tensor(1.0), "total": torch.tensor(1.0)})
    terms = {"student_rec": 1.0, "sgr": float("inf"), "total": float("nan")}
    guard.see(a_batch(6), {name: torch.tensor(value) for name, value in terms.items()})
    with caplog.at_level(logging.WARNING):
        guard.skipped(9)
    (message,) = caplog.messages
    assert message.startswith("step 9 is skipped") and message.endswith(
        ": sgr is inf; its samples: s-6 (position 6), s-7 (position 7)"
    )
    assert guard.num_skipped == 1 and not (tmp_path / "tiny/bad_steps").exists()


def test_a_gradient_is_named_in_the_second_bad_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    guard = StepGuard(tiny_run(tmp_path, engine={"max_bad_steps": 2}), net)
    step(guard, net, 0.0)
    with caplog.at_level(logging.WARNING):
        guard.skipped(1)
    assert "though all losses are finite" in caplog.text
    step(guard, net, 0.0)
    with pytest.raises(TrainingError, match=r"the gradient of late\.(weight|bias), .*its samples: s-2") as stopped:
        guard.skipped(2)
    path = tmp_path / "tiny/bad_steps/step-00000002-rank0"
    assert f"{path}.safetensors" in str(stopped.value)
    batch, _ = guard.seen[1]
    written = load_file(f"{path}.safetensors")
    assert torch.equal(written["lq"], batch.lq) and torch.equal(written["gt"], batch.gt)
    told = json.loads(Path(f"{path}.json").read_text())
    assert (told["step"], told["rank"], told["keys"], told["positions"]) == (2, 0, ["s-2", "s-3"], [2, 3])
    assert told["terms"] == {"student_rec": 1.0, "total": 1.0}


def test_a_good_step_ends_the_row_and_the_search(tmp_path: Path) -> None:
    net = Net()
    guard = StepGuard(tiny_run(tmp_path, engine={"max_bad_steps": 2}), net)
    for number in (1, 3, 5):
        step(guard, net, 0.0)
        guard.skipped(number)
        step(guard, net, 1.0)
        guard.passed()
        assert not net.late.weight._backward_hooks  # which cost time
    step(guard, net, 0.0)
    guard.skipped(7)
    step(guard, net, 0.0)
    with pytest.raises(TrainingError, match="the gradient of late"):
        guard.skipped(8)
    assert guard.num_skipped == 5


def test_a_folder_that_cannot_be_written_hides_no_cause(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_text("a file, where the run's folder should be")
    net = Net()
    guard = StepGuard(tiny_run(tmp_path, engine={"max_bad_steps": 1}), net)
    step(guard, net, 0.0)
    with pytest.raises(TrainingError, match=r"(?s)the gradient of late.*could not be written"):
        guard.skipped(1)
