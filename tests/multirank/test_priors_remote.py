"""`remote` on several ranks: servers are dealt out, and what is wrong with one rank's is every rank's error."""

import socket
from pathlib import Path
from typing import Any

import pytest

from dist_train.priors.regions import RegionsPrior
from tests.helpers.mask_servers import serving
from tests.helpers.spawn import run_ranks
from tests.multirank import ranks_of_remote as work

pytestmark = pytest.mark.multirank


class Named(RegionsPrior):
    """Regions with weights from a file of its own."""

    def __init__(self, weights: str, sha256: str = "0") -> None:
        super().__init__(work.REGIONS)
        object.__setattr__(self, "about", {"weights": weights, "sha256": sha256})  # it is frozen

    def describe(self) -> dict[str, Any]:
        return super().describe() | self.about  # type: ignore[attr-defined]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return str(tmp_path)


def test_each_rank_has_its_server_and_all_refuse_together(home: str) -> None:
    regions = work.REGIONS
    other = regions.model_copy(update={"scale": 9.0})
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
    with (
        serving(regions, Named("a")) as a,
        serving(regions, Named("b")) as b,
        serving(other, Named("c")) as c,
        serving(regions, Named("d", "1")) as d,
    ):
        assert run_ranks(work.ask, 3, home, (a, b), 20) == [(True, "a"), (True, "b"), (True, "a")]
        for last, message in (
            (c, f"mask server {c} was started with prior.of.scale=9.0, not 50.0"),
            (d, f"mask servers {a} and {d} differ in sha256: 0 and 1"),
            (nobody, f"no mask server at {nobody}"),
        ):
            for found, said in run_ranks(work.ask, 2, home, (a, last), 1):
                assert not found and message in said
