"""What is made of a tensor once and used many times: a plan of a layer's indices, say."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

Made = TypeVar("Made")


class Remembered(Generic[Made]):
    """What `make` makes of a tensor; made anew where it is another tensor, or was written to since.

    Args:
        make: is given the tensor, and what else `of` is.
    """

    def __init__(self, make: Callable[..., Made]) -> None:
        self._make = make
        self._tensor: Tensor | None = None
        self._key: tuple[Any, ...] = ()
        self._made: Made | None = None

    def of(self, tensor: Tensor, *others: Any) -> Made:
        """What is made of `tensor` as it is now."""
        if tensor.is_inference():  # such a tensor does not count what is written to it
            return self._make(tensor, *others)
        key = (tensor._version, *others)
        if self._made is None or tensor is not self._tensor or key != self._key:
            self._made = self._make(tensor, *others)
            self._tensor, self._key = tensor, key
        return self._made
