"""Which linear layer of a transformer block does what, by the names that transformers' families give them.

Each pattern matches a whole module name. Attention over another sequence (cross-attention) is matched by none.
"""

import re

from torch import nn

from infra.errors import InvalidInput
from training.methods.targets import Targets, linear_modules, select

ATTENTION_OUTPUT = (  # the last layer of self-attention
    r"(.*\.)?((?<!cross_attn\.)(?<!encoder_attn\.)o_proj|out_lin|SelfAttention\.o|attention\.output\.dense"
    r"|attn\.c_proj|(self_)?attention\.dense|(self_attn|attn|attention)\.out_proj)"
)
FEEDFORWARD_INPUT = (  # the first layer of a feed-forward block; of a gated one, the layer that is not the gate
    r"(.*\.)?(up_proj|gate_up_proj|wi|wi_1|w3|fc1|lin1|linear1|fc_in|dense_h_to_4h|mlp\.c_fc|intermediate\.dense)"
)
FEEDFORWARD_OUTPUT = (  # the last layer of a feed-forward block
    r"(.*\.)?(down_proj|wo|w2|fc2|lin2|linear2|fc_out|dense_4h_to_h|mlp\.c_proj|(?<!attention\.)output\.dense)"
)


def known_layers(model: nn.Module, pattern: str, method: str, what: str, remedy: str) -> list[str]:
    """The linear layers whose names match `pattern`.

    Raises:
        InvalidInput: there is none; the message names `method` and `what` was sought, and ends with `remedy`.
    """
    names = [name for name in linear_modules(model) if re.fullmatch(pattern, name)]
    if not names:
        last = dict.fromkeys(name.rpartition(".")[2] for name in linear_modules(model))
        raise InvalidInput(
            f"{method} does not know which layers of {type(model).__name__} are its {what}.",
            f"{remedy} Linear modules: {', '.join(last)}.",
        )
    return names


def select_known(model: nn.Module, given: Targets | None, pattern: str, method: str, option: str) -> list[str]:
    """The linear layers that the user has `given`, or else those whose names match `pattern`.

    Raises:
        InvalidInput: there is none; the message names `method` and its `option`.
    """
    if given is not None:
        return select(model, given)
    return known_layers(model, pattern, method, option, f"Say so: {option}: […].")
