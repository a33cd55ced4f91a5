"""Kernels, their tests and benchmarks run on a GPU machine that has little more than PyTorch."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = {"kernels", "benchmarks", "tests"}
INSTALLED = {"torch", "triton", "numpy"}
COMPARED = {"transformers", "peft", "liger_kernel", "matplotlib"}  # by benchmarks, where they are installed
FILES = [
    ROOT / "tests" / "conftest.py",
    *(ROOT / "benchmarks" / name for name in ("results_file.py", "memory.py")),
    *(path for folder in ("kernels", "tests/kernels", "benchmarks/kernels") for path in (ROOT / folder).glob("*.py")),
]


def imported(source: str) -> Iterator[str]:
    """The whole names of modules that are imported as soon as the file is."""
    for node in ast.parse(source).body:
        for each in ast.walk(node) if not isinstance(node, ast.FunctionDef | ast.ClassDef) else ():
            if isinstance(each, ast.Import):
                yield from (alias.name for alias in each.names)
            elif isinstance(each, ast.ImportFrom):
                yield each.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_imported_that_such_a_machine_lacks(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    installed = INSTALLED | (COMPARED if "benchmarks" in path.parts else {"pytest"} if "tests" in path.parts else set())
    for name in imported(source):
        top = name.partition(".")[0]
        if top == "hypothesis" and ("importorskip(" in source or "suppress(ImportError)" in source):
            continue
        assert top in sys.stdlib_module_names | installed | HERE, name
        if top in HERE and top != "kernels":
            assert (ROOT / f"{name.replace('.', '/')}.py") in FILES or name == "benchmarks.kernels", name
