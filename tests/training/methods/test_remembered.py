"""What is made of a tensor is made once, and again where the tensor has changed."""

import copy

import torch
from torch import nn

from training.methods.remembered import Remembered


def doubled(tensor: torch.Tensor, plus: int = 0) -> list[int]:
    return [2 * value + plus for value in tensor.tolist()]


def test_it_is_made_once() -> None:
    remembered, tensor = Remembered(doubled), torch.tensor([1, 2])
    first = remembered.of(tensor)
    assert first == [2, 4]
    assert remembered.of(tensor) is first


def test_it_is_made_again_of_another_tensor_of_one_that_was_written_to_and_for_other_arguments() -> None:
    remembered, tensor = Remembered(doubled), torch.tensor([1, 2])
    remembered.of(tensor)
    tensor[0] = 5
    assert remembered.of(tensor) == [10, 4]
    assert remembered.of(torch.tensor([5, 2])) == [10, 4]
    assert remembered.of(tensor, 1) == [11, 5]
    assert remembered.of(torch.tensor([7])) == [14]


def test_a_copied_module_remembers_of_its_own_tensor() -> None:
    module = nn.Module()
    module.register_buffer("indices", torch.tensor([1, 2]))
    module.remembered = Remembered(doubled)
    module.remembered.of(module.indices)
    other = copy.deepcopy(module)
    other.indices.copy_(torch.tensor([3, 4]))
    assert other.remembered.of(other.indices) == [6, 8]
    assert module.remembered.of(module.indices) == [2, 4]


def test_of_a_tensor_of_inference_which_counts_no_writes_nothing_is_remembered() -> None:
    remembered = Remembered(doubled)
    with torch.inference_mode():
        tensor = torch.tensor([1, 2])
        assert remembered.of(tensor) == [2, 4]
        tensor[0] = 5
        assert remembered.of(tensor) == [10, 4]
