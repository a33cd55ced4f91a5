"""The repeated layers of a model: transformer blocks, by the name of each."""

from torch import nn


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Every member of the model's stacks of like layers, in the model's order; both stacks of an encoder-decoder.

    A stack is an outermost `nn.ModuleList` of more than one module, all of one class (`model.layers`, `transformer.h`,
    `encoder.layer`, `decoder.block`).
    """
    found: dict[str, nn.Module] = {}
    stacks: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{stack}.") for stack in stacks):
            continue
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(member) for member in module}) == 1:
            stacks.append(name)
            found |= {f"{name}.{number}": member for number, member in enumerate(module)}
    return found
