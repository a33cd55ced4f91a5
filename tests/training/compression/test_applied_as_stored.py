"""Files that kernels read as they are: what is applied without being decoded is what the codec decodes."""

import numpy as np
import pytest
import torch

from kernels.codebook import PackedCodes, apply_binary, decode_codes
from kernels.dispatch import runs_on_triton
from kernels.ternary import apply_ternary, decode_ternary
from tests.kernels.packed import DTYPES, inputs
from training.compression import compress, container, decompress
from training.compression.compeft import masks
from training.compression.levels import levels


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_masks_of_a_compeft_file_decode_and_apply_as_the_file_does(dtype: str) -> None:
    tensors = {"a": inputs(24, 40, getattr(torch, dtype), False), "b": inputs(17, 9, getattr(torch, dtype), False)}
    data = compress(tensors, "compeft:layout=bitmask,density=0.2")
    scale, found = masks(data)
    for name, decoded in decompress(data).items():
        gamma = found[name].packed(tuple(decoded.shape))
        assert not runs_on_triton(gamma.nonzero)
        assert torch.equal(decode_ternary(gamma, scale, decoded.dtype), decoded)
        x = inputs(5, decoded.shape[1], torch.float64, False)
        torch.testing.assert_close(apply_ternary(x, gamma, scale), x @ decoded.double().T)
    assert set(found) == {"a", "b"}
    # The Golomb layout holds the same numbers, read by other code.
    golomb = decompress(compress(tensors, "compeft:layout=golomb,density=0.2"))
    assert all(torch.equal(golomb[name], decoded) for name, decoded in decompress(data).items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_of_a_codebook_is_applied_as_what_it_decodes_to(dtype: str) -> None:
    """μ and σ are read from the file's bytes here, not by the codec."""
    data = compress({"a": inputs(24, 40, getattr(torch, dtype), False)}, "codebook:bits=1")
    decoded = decompress(data)["a"]
    (stored,) = container.read(data).tensors
    content = np.frombuffer(stored.content, np.uint8)
    mean, deviation = torch.from_numpy(content[-8:].copy().view("<f4"))
    low, high = (levels(1).float() * deviation + mean).to(decoded.dtype)
    packed = PackedCodes((24, 40), 1, torch.from_numpy(content[:-8].copy()))
    assert torch.equal(decode_codes(packed, torch.stack([low, high])), decoded)
    x = inputs(5, 40, torch.float64, False)
    torch.testing.assert_close(apply_binary(x, packed, low.item(), high.item()), x @ decoded.double().T)
