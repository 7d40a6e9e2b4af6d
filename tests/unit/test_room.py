"""Memory that is given back to the system."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

SCRIPT = """
import re
from pathlib import Path
from dist_train.room import give_back_freed_memory

def resident_mib():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

blocks = [b"x" * 100_000 for _ in range(2000)]
blocks = blocks[::50]  # they keep the heap from shrinking by itself
before = resident_mib()
give_back_freed_memory()
print(before - resident_mib())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much memory is resident")
def test_what_lies_free_between_living_blocks_is_given_back() -> None:
    libc = Path("/proc/self/maps").read_text()
    if not re.search(r"/libc\.so\.6|/libc-2", libc) or "musl" in libc:
        pytest.skip("only glibc's heap is trimmed")
    told = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    assert float(told.stdout) > 100  # of 190 MiB that were freed
