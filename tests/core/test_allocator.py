"""Freed memory stays with the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from burnish.core.allocator import keep_freed_memory, release_freed_memory

if sys.argv[1] == "keep":
    print(keep_freed_memory(), file=sys.stderr)

def touch():
    for size in (40, 9, 70):
        torch.ones(size << 18)  # so many MB

for _ in range(8):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
release_freed_memory()
print(int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20)
"""


def run_child(how: str, **environment: str) -> tuple[int, int, str]:
    """(page faults of a further round, resident MB after the release, what was said)"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    faults, resident = done.stdout.split()
    return int(faults), int(resident), done.stderr


@pytest.mark.skipif(sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="glibc only")
def test_freed_memory_is_used_again():
    faults, resident, said = run_child("keep")
    assert faults < 100, "119 MB are 29,000 pages"
    assert "freed memory is reused" in said
    plain, plain_resident, _ = run_child("leave")
    assert plain > 10_000, "else this check sees nothing"
    assert resident < plain_resident + 16, "a release hands it back"


def test_a_choice_of_the_users_is_left_alone():
    assert "MALLOC_MMAP_MAX_" in run_child("keep", MALLOC_MMAP_MAX_="7")[2]
