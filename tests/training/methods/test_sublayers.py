"""The names of sub-layers, on models of the families themselves."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from training.methods.sublayers import ATTENTION_OUTPUT, FEEDFORWARD_INPUT, FEEDFORWARD_OUTPUT, known_layers


def meta(config: str, model: str, **sizes: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.device("meta"):
            return getattr(transformers, model)(getattr(transformers, config)(**sizes))

    return build


CASES = {
    "llama": (
        meta("LlamaConfig", "LlamaForCausalLM", num_hidden_layers=1),
        ({"self_attn.o_proj"}, {"mlp.up_proj"}, {"mlp.down_proj"}),
    ),
    "phi3": (
        meta("Phi3Config", "Phi3ForCausalLM", num_hidden_layers=1),
        ({"self_attn.o_proj"}, {"mlp.gate_up_proj"}, {"mlp.down_proj"}),
    ),
    "neox": (
        meta("GPTNeoXConfig", "GPTNeoXForCausalLM", num_hidden_layers=1),
        ({"attention.dense"}, {"mlp.dense_h_to_4h"}, {"mlp.dense_4h_to_h"}),
    ),
    "bloom": (
        meta("BloomConfig", "BloomForCausalLM", n_layer=1),
        ({"self_attention.dense"}, {"mlp.dense_h_to_4h"}, {"mlp.dense_4h_to_h"}),
    ),
    "gpt-neo": (
        meta("GPTNeoConfig", "GPTNeoForCausalLM", num_layers=2, attention_types=[[["global", "local"], 1]]),
        ({"attention.out_proj"}, {"mlp.c_fc"}, {"mlp.c_proj"}),
    ),
    "gpt-j": (
        meta("GPTJConfig", "GPTJForCausalLM", n_layer=1),
        ({"attn.out_proj"}, {"mlp.fc_in"}, {"mlp.fc_out"}),
    ),
    "opt": (
        meta("OPTConfig", "OPTForCausalLM", num_hidden_layers=1),
        ({"self_attn.out_proj"}, {"0.fc1"}, {"0.fc2"}),
    ),
    "bart": (  # cross-attention and the head's out_proj are none of these
        meta("BartConfig", "BartForSequenceClassification", encoder_layers=1, decoder_layers=1),
        ({"self_attn.out_proj"}, {"0.fc1"}, {"0.fc2"}),
    ),
    "t5": (
        meta("T5Config", "T5ForSequenceClassification", num_layers=1),
        ({"SelfAttention.o"}, {"DenseReluDense.wi"}, {"DenseReluDense.wo"}),
    ),
    "roberta": (
        meta("RobertaConfig", "RobertaForSequenceClassification", num_hidden_layers=1),
        ({"output.dense"}, {"intermediate.dense"}, {"output.dense"}),
    ),
    "distilbert": (
        meta("DistilBertConfig", "DistilBertForSequenceClassification", n_layers=1),
        ({"attention.out_lin"}, {"ffn.lin1"}, {"ffn.lin2"}),
    ),
}


@pytest.mark.parametrize("family", CASES)
def test_each_sub_layer_is_found_once_a_block(family: str) -> None:
    build, expected = CASES[family]
    model = build()
    for pattern, endings in zip((ATTENTION_OUTPUT, FEEDFORWARD_INPUT, FEEDFORWARD_OUTPUT), expected, strict=True):
        names = known_layers(model, pattern, "a method", "layers", "")
        assert {".".join(name.split(".")[-2:]) for name in names} == endings
        assert len(names) == (2 if family in ("bart", "t5", "gpt-neo") else 1)


def test_roberta_has_two_layers_called_output() -> None:
    model = CASES["roberta"][0]()
    block = "roberta.encoder.layer.0"
    assert known_layers(model, ATTENTION_OUTPUT, "", "", "") == [f"{block}.attention.output.dense"]
    assert known_layers(model, FEEDFORWARD_OUTPUT, "", "", "") == [f"{block}.output.dense"]
