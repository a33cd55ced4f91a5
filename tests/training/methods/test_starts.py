"""Starts that are kept from one training to the next."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_models import tiny_llama
from tests.training.methods.backbones import BACKBONES
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.methods.starts import StartCache

REPOSITORY = Path(__file__).parents[3]
WHAT = {"method": "pissa", "rank": 4, "layers": ["a", "b"]}


class Counted:
    """Makes a start, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, Tensor]:
        self.calls += 1
        whole = torch.arange(12.0).reshape(3, 4) + self.calls
        return {"a.A": whole[:2], "b.A": whole, "a.B": whole.T}  # views of one tensor, one of them not contiguous


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_start_is_computed_once(tmp_path: Path) -> None:
    make = Counted()
    first = StartCache(tmp_path / "starts", "base", "data").get(WHAT, make)
    assert same(first, Counted()())
    second = StartCache(tmp_path / "starts", "base", "data").get(dict(reversed(WHAT.items())), make)
    assert make.calls == 1 and same(first, second)
    assert [path.suffix for path in (tmp_path / "starts").iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    ("base", "data", "what"),
    [
        ("other", "data", WHAT),
        ("base", "other", WHAT),
        ("base", "data", WHAT | {"rank": 5}),
        ("base", "data", WHAT | {"layers": ["b", "a"]}),
        ("basedata", "", WHAT),
    ],
)
def test_another_base_other_data_or_options_compute_anew(tmp_path: Path, base: str, data: str, what: dict) -> None:
    make = Counted()
    StartCache(tmp_path, "base", "data").get(WHAT, make)
    StartCache(tmp_path, base, data).get(what, make)
    assert make.calls == 2
    StartCache(tmp_path, "base", "data").get(WHAT, make)
    assert make.calls == 2


@pytest.mark.parametrize("left", [0, 5, -1], ids=["empty", "header cut", "last byte cut"])
def test_a_truncated_file_is_made_anew(tmp_path: Path, left: int) -> None:
    make = Counted()
    cache = StartCache(tmp_path, "base", "data")
    cache.get(WHAT, make)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:left])
    again = cache.get(WHAT, make)
    assert make.calls == 2 and same(load_file(path), again)
    cache.get(WHAT, make)
    assert make.calls == 2


def test_a_file_in_which_a_bit_has_changed_is_made_anew(tmp_path: Path) -> None:
    make = Counted()
    cache = StartCache(tmp_path, "base", "data")
    cache.get(WHAT, make)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert same(cache.get(WHAT, make), load_file(path)) and make.calls == 2
    save_file(load_file(path), path)  # a file without its sum, as any other would be
    cache.get(WHAT, make)
    assert make.calls == 3
    cache.get(WHAT, make)
    assert make.calls == 3


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata)
        raise OSError("no space left on device")

    monkeypatch.setattr("training.methods.starts.save_file", full)
    with pytest.raises(OSError, match="no space"):
        StartCache(tmp_path, "base", "data").get(WHAT, Counted())
    assert list(tmp_path.iterdir()) == []


AT_ONCE = """
import sys, time, torch
from pathlib import Path
from training.methods.starts import StartCache

def make():
    print("making", flush=True)
    sys.stdin.readline()  # until both are at it
    return {"A": torch.full((400, 400), 3.0), "B": torch.arange(9.0)}

kept = StartCache(Path(sys.argv[1]), "base", "data").get({"rank": 4}, make)
assert kept["A"].sum() == 3 * 400 * 400
"""


def test_two_processes_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", AT_ONCE, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdout and worker.stdout.readline() == "making\n"  # both found no file
    for worker in workers:
        assert worker.stdin
        worker.stdin.write("on\n")
        worker.stdin.flush()
    assert [worker.wait(60) for worker in workers] == [0, 0]
    for worker in workers:
        assert worker.stdin and worker.stdout
        worker.stdin.close()
        worker.stdout.close()
    (path,) = tmp_path.iterdir()
    kept = load_file(path)
    assert torch.equal(kept["A"], torch.full((400, 400), 3.0)) and torch.equal(kept["B"], torch.arange(9.0))


@pytest.mark.parametrize(
    ("method", "options", "other"),
    [
        ("pissa", {"rank": 2}, {"rank": 3}),
        ("corda", {"rank": 2}, {"rank": 2, "mode": "kpm"}),
        ("eva", {"rank": 2}, {"rank": 2, "rho": 1}),
        ("lora-ga", {"rank": 1, "direction": "random"}, {"rank": 1, "gamma": 4}),
    ],
)
def test_a_method_starts_from_what_was_kept(tmp_path: Path, method: str, options: dict, other: dict) -> None:
    drawn = 0

    def calibration() -> list[dict[str, Tensor]]:
        nonlocal drawn
        drawn += 1
        return BACKBONES["llama"].calibration()

    def digest(seed: int, chosen: dict) -> str:
        context = AttachContext(seed=seed, calibration=calibration, starts=StartCache(tmp_path, "base", "data"))
        adapted = get_method(method).attach(tiny_llama(), get_method(method).config_type(**chosen), context)
        told = hashlib.sha256()
        for name, tensor in adapted.tensors().items():
            told.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return told.hexdigest()

    first, files, draws = digest(0, options), set(tmp_path.iterdir()), drawn
    assert digest(0, options) == first and set(tmp_path.iterdir()) == files and drawn == draws
    digest(0, other)
    assert len(set(tmp_path.iterdir())) == 2
    digest(1, options)
    assert len(set(tmp_path.iterdir())) == 3
