"""Nested training state (optimiser, schedule, random generators) in a safetensors file: no pickle, no code on loading.

Tensors go under numbered names; what holds them together (dicts, lists, tuples, plain values) is JSON in the header.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_KEY = "structure"


def write_state(state: Any, path: Path) -> None:
    """Write `state` to `path`.

    Raises:
        TypeError: it holds something that is neither a tensor, an array, a container nor a plain value.
    """
    tensors: list[Tensor] = []
    structure = json.dumps(_flatten(state, tensors))
    named = {str(number): tensor.detach().cpu().contiguous().clone() for number, tensor in enumerate(tensors)}
    save_file(named, path, metadata={_KEY: structure})


def read_state(path: Path) -> Any:
    """What `write_state` wrote, bit for bit, with its tensors on the CPU."""
    with safe_open(path, framework="pt") as file:
        structure = json.loads(file.metadata()[_KEY])
        return _restore(structure, file.get_tensor)


def _flatten(value: Any, tensors: list[Tensor]) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, np.ndarray):
        tensors.append(torch.from_numpy(value.astype(np.int64)))  # the only arrays are random states: uint32
        return {"array": str(len(tensors) - 1), "dtype": str(value.dtype)}
    if isinstance(value, dict):
        return {"dict": [[_flatten(key, tensors), _flatten(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_flatten(inner, tensors) for inner in value]}
    if hasattr(value, "item"):  # a NumPy number
        return _flatten(value.item(), tensors)
    raise TypeError(f"Training state holds a {type(value).__name__}, which has no place in a safetensors file.")


def _restore(node: Any, tensor: Any) -> Any:
    if not isinstance(node, dict):
        return node
    match node:
        case {"tensor": name}:
            return tensor(name)
        case {"array": name, "dtype": dtype}:
            return tensor(name).numpy().astype(dtype)
        case {"dict": pairs}:
            return {_restore(key, tensor): _restore(inner, tensor) for key, inner in pairs}
        case {"list": items}:
            return [_restore(inner, tensor) for inner in items]
        case {"tuple": items}:
            return tuple(_restore(inner, tensor) for inner in items)
    raise ValueError(f"not a training state: {sorted(node)}")
