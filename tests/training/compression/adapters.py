"""Adapters to compress: of every dtype, of odd and empty shapes, and with numbers of every kind."""

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("normal", "uniform", "zeros", "constant", "ternary", "heavy", "shifted")
SHAPES = ((), (0,), (1,), (2,), (3, 5), (7, 0, 2), (8,), (1, 129), (64, 9), (31, 33))


def numbers(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, size: float = 0.02) -> Tensor:
    """A tensor of the kind, `size` large."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    made = {
        "normal": lambda: normal,
        "uniform": lambda: torch.rand(shape, generator=generator, dtype=torch.float64) - 0.3,
        "zeros": lambda: normal * 0,
        "constant": lambda: torch.full(shape, 1.25, dtype=torch.float64),
        "ternary": lambda: normal.sign() * (normal.abs() > 1.7),
        "heavy": lambda: normal / (0.05 + torch.rand(shape, generator=generator, dtype=torch.float64)),
        "shifted": lambda: normal * 0.1 + 1,
    }[kind]()
    return (made * size).to(dtype)


@st.composite
def adapters(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> dict[str, Tensor]:
    """From no tensor to four."""
    one = st.builds(
        numbers,
        st.sampled_from(KINDS),
        st.sampled_from(SHAPES),
        st.sampled_from(dtypes),
        st.integers(0, 2**32),
        st.sampled_from((0.02, 1e-4, 3.0)),
    )
    names = st.sampled_from(("a", "b.lora_A.weight", "b.lora_B.weight", "z:1"))
    return draw(st.dictionaries(names, one, max_size=4))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(one[name], other[name])
        for name in one
    )
