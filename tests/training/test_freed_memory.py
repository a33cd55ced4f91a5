"""What a step frees is there for the next one; in a process of its own, since the allocator stays as it is set."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource
import psutil
import torch
from training.freed_memory import freed_memory_kept

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 2048), torch.nn.Linear(2048, 64))
batch = torch.randn(8192, 64)

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(batch).square().sum().backward()  # activations and gradients of 64 MiB, more than glibc ever keeps
    model.zero_grad()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return psutil.Process().memory_info().rss

anew = [step() for _ in range(8)]
with freed_memory_kept(torch.device("cpu")):
    kept, inside = [step() for _ in range(8)], resident()
given_back = inside - resident()
print(sum(anew), sum(kept), given_back, step())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_a_second_step_faults_no_page_in_again_and_the_memory_goes_back_at_the_end() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    anew, kept, given_back, again = map(int, ran.stdout.split())
    assert anew > 8000
    assert kept < anew / 2  # the heap takes a step or two to settle
    assert given_back > 64 * 2**20
    assert again > 1000
