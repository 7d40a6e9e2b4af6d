"""A rank that only reads: what tests/e2e/test_samples.py starts, kills, and starts again."""

import os
import sys
import time

from dist_train import ranks
from dist_train.config import load_run, plan_batch
from dist_train.data.ledger import Ledger
from dist_train.data.loader import training_batches
from dist_train.data.mixture import open_training


def main(path: str) -> None:
    """Go on to the last step; `committed` in the run's folder tells after which step to begin, as a checkpoint does."""
    run = load_run(path)
    ranks.join_ranks("cpu")
    plan = plan_batch(run.optim, ranks.world_size())
    committed = run.dir / "committed"
    start = ranks.on_main(lambda: int(committed.read_text()) if committed.exists() else 0)

    def commit(step: int) -> None:
        part = committed.with_suffix(".tmp")
        part.write_text(str(step))
        os.replace(part, committed)

    reader = open_training(run.data)
    batches = training_batches(
        reader, run.data, seed=run.seed, plan=plan, rank=ranks.rank(), world=ranks.world_size(), start_step=start
    )
    with Ledger(run, num_samples=len(reader), start_step=start) as ledger:
        for step in range(start + 1, run.optim.steps + 1):
            for _ in range(plan.grad_accum):
                ledger.note(next(batches))
            ledger.settle()  # all ranks
            if step % run.checkpoint.every == 0 or step == run.optim.steps:
                ranks.on_main(lambda step=step: commit(step))
            time.sleep(0.02)
    batches.close()
    ranks.stop_ranks()


if __name__ == "__main__":
    main(sys.argv[1])
