"""A LoRA out of a fine-tuned or merged model: the difference from its base, layer by layer, at a lower rank."""

import torch
from safetensors import safe_open
from torch import nn

from infra.errors import BaseModelMismatch, InvalidInput
from training.base_identity import read_json
from training.base_models import BaseFolder
from training.interchange.lora_layers import LoraLayer, require_finite
from training.interchange.truncation import Keep, Loss, truncated
from training.interchange.weight_changes import linear_changes, other_changes, parameters_of
from training.merged_model import FLOATS
from training.methods.targets import linear_modules, require_room


def extracted(
    base: nn.Module, tuned: nn.Module, keep: Keep, dtype: torch.dtype | None = None
) -> tuple[dict[str, LoraLayer], Loss]:
    """The LoRA that is nearest to what turned `base` into `tuned`, and what is lost by it.

    Norms, biases and embeddings that changed are no LoRA's to say: they are left out and listed in `Loss.left_out`.

    Args:
        base: the plain base.
        tuned: a plain model of the same class and size.
        keep: a rank for every layer, or the energy to hold.
        dtype: in which `tuned` was stored: the base is rounded to it first, or all of it would seem to have changed.

    Raises:
        BaseModelMismatch: another class or size of model.
        InvalidInput: no linear layer differs, or none has so high a rank.
        CorruptArtifact: the tuned model has NaN or infinity in it.
    """
    if type(base) is not type(tuned):
        raise BaseModelMismatch(
            f"The model is a {type(tuned).__name__}, its base a {type(base).__name__}.",
            "Name the base that it was made from: regraft base list",
        )
    if keep.rank is not None:
        require_room(linear_modules(base).values(), keep.rank, "--rank")
    before, after = parameters_of(base), parameters_of(tuned)
    require_finite(after)
    if dtype is not None:
        before = {name: tensor.to(dtype).to(tensor.dtype) for name, tensor in before.items()}
    left_out = other_changes(tuned, before, after)
    layers, loss = truncated(linear_changes(tuned, before, after), keep)
    if not layers:
        raise InvalidInput(
            "No linear layer of the model differs from the base's: there is nothing to extract.",
            "Is it the fine-tuned model, and not the base itself?",
        )
    return layers, Loss(loss.layers, loss.total, left_out)


def require_floats(model: BaseFolder) -> None:
    """Raise `InvalidInput` where a model's weights are quantised: what they mean is not in them alone."""
    if read_json(model.directory / "config.json").get("quantization_config"):
        raise _quantised("its config.json has a quantization_config")
    for file in sorted(model.directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                code = opened.get_slice(name).get_dtype()
                if name.endswith("weight") and code not in FLOATS:
                    raise _quantised(f"{name} is of {code}")


def _quantised(why: str) -> InvalidInput:
    return InvalidInput(
        f"The model's weights are quantised: {why}.",
        "Write it as float32, float16 or bfloat16 with the tool that made it.",
    )
