"""Trained columns and rows against derivatives by differences, and against what PyTorch keeps for the backward pass."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from infra.errors import CorruptArtifact
from training.methods.slices import ColumnSlot, RowSlot, SliceSlot, stored_slot

M, N, CHOSEN = 5, 7, torch.tensor([1, 4])


def layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made = Conv1D(M, N) if kind == "conv1d" else nn.Linear(N, M, bias=kind == "bias")
    if kind == "conv1d":
        nn.init.normal_(made.bias)
    return made.requires_grad_(False)


def slot(kind: type[SliceSlot], scale: float = 2.0) -> SliceSlot:
    made = kind(CHOSEN, M if kind is ColumnSlot else N, scale)
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return made


@pytest.mark.parametrize("kind", [ColumnSlot, RowSlot])
@pytest.mark.parametrize("base", ["bias", "no bias", "conv1d"])
@pytest.mark.parametrize("rows", [(), (3,), (2, 3)], ids=str)
def test_the_derivatives_are_those_by_differences(kind, base, rows) -> None:
    module, one = layer(base).double(), slot(kind).double()
    delta = next(one.parameters())

    def output(x: Tensor, delta: Tensor) -> Tensor:
        return torch.func.functional_call(one, {next(iter(dict(one.named_parameters()))): delta}, (module, x))

    x = torch.randn(*rows, N, dtype=torch.float64, requires_grad=True)
    if base == "conv1d" and not rows:
        pytest.skip("Conv1D takes no vector")
    assert torch.autograd.gradcheck(output, (x, delta))


@pytest.mark.parametrize("kind", [ColumnSlot, RowSlot])
@pytest.mark.parametrize("base", ["bias", "conv1d"])
def test_the_output_is_that_of_a_weight_with_delta_in_it(kind, base) -> None:
    module, one = layer(base), slot(kind)
    weight = (module.weight.T if base == "conv1d" else module.weight).clone()
    for place, index in enumerate(CHOSEN.tolist()):
        if kind is ColumnSlot:
            weight[:, index] += 2 * one.delta[:, place].detach()
        else:
            weight[index] += 2 * one.delta_rows[place].detach()
    before = module.weight.clone()
    x = torch.randn(2, 3, N)
    assert_close(one(module, x), x @ weight.T + module.bias)
    assert torch.equal(module.weight, before)
    held = module.weight.T if base == "conv1d" else module.weight
    assert_close(held + one.update(held), weight)
    A, B = one.low_rank(held)
    assert A.shape == (2, N) and B.shape == (M, 2)
    assert_close(held + B @ A, weight)


def test_of_the_input_only_the_chosen_features_are_kept() -> None:
    tokens, n, k = 30, 64, 4
    base, kept = nn.Linear(n, n).requires_grad_(False), []
    one = ColumnSlot(torch.arange(k), n)
    lasting = {tensor.untyped_storage().data_ptr() for tensor in [*base.parameters(), *one.state_dict().values()]}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in lasting:
            kept.append(tensor.untyped_storage().nbytes())  # of all that stays alive, not of a view
        return tensor

    x = torch.randn(tokens, n, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        one(base, x)
    assert kept == [tokens * k * 4]


@pytest.mark.parametrize("kind", [ColumnSlot, RowSlot])
def test_without_a_gradient_of_the_input_none_is_taken(kind) -> None:
    one, x = slot(kind), torch.randn(3, N)
    one(layer("bias"), x).sum().backward()
    assert x.grad is None and next(one.parameters()).grad is not None


@pytest.mark.parametrize("kind", [ColumnSlot, RowSlot])
@pytest.mark.parametrize("how", ["autocast", "base"])
def test_in_bfloat16_delta_stays_float32(kind, how) -> None:
    exact, rough = slot(kind), slot(kind)
    module = layer("bias")
    x = torch.randn(4, 3, N).to(torch.bfloat16).float()
    exact_x, rough_x = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    exact(module, exact_x).square().sum().backward()
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            output = rough(module, rough_x)
    else:
        output = rough(module.to(torch.bfloat16), rough_x.to(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    mine, yours = next(rough.parameters()), next(exact.parameters())
    assert mine.grad.dtype == rough_x.grad.dtype == torch.float32
    assert (mine.grad - yours.grad).norm() < 0.02 * yours.grad.norm()
    assert (rough_x.grad - exact_x.grad).norm() < 0.02 * exact_x.grad.norm()


@pytest.mark.parametrize("indices", [[4, 1], [1, 1], [-1, 2], [3, N], []])
def test_stored_indices_that_are_none_are_refused(indices) -> None:
    tensors = {"indices": torch.tensor(indices, dtype=torch.int64), "delta": torch.zeros(M, len(indices))}
    with pytest.raises(CorruptArtifact, match=f"ascending whole numbers below {N}"):
        stored_slot(layer("bias"), tensors)
