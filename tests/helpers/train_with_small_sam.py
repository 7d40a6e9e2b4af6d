"""`launch.train` with the small trained SAM as its prior `sam`: `python -m tests.helpers.train_with_small_sam RUN`.

For what only a run can tell, such as how fast its masks go stale (`python -m launch.mask_ages`).
"""

import sys

from dist_train.priors import PRIORS
from dist_train.priors.sam import SamPrior
from launch.train import main
from tests.helpers.trained_sam import WEIGHTS, trained_sam

if __name__ == "__main__":
    PRIORS["sam"] = lambda config, device: SamPrior(trained_sam().to(device), config, weights=str(WEIGHTS))
    sys.exit(main())
