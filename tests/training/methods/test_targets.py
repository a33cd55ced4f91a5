"""Which layers a choice of targets means."""

import pytest
from torch import nn

from infra.errors import InvalidInput
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.methods.targets import linear_modules, select, shape, shortest


def test_names_endings_patterns_and_exclusions() -> None:
    model = tiny_llama()
    assert select(model, ("q_proj",)) == [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert select(model, ("layers.1.mlp.up_proj",)) == ["model.layers.1.mlp.up_proj"]
    assert select(model, r".*layers\.0.*(q|v)_proj") == [f"model.layers.0.self_attn.{x}_proj" for x in "qv"]
    everything = select(model, "all-linear")
    assert len(everything) == 14 and "lm_head" not in everything
    assert select(model, "all-linear", exclude=("mlp.up_proj",)) == [n for n in everything if "up_proj" not in n]
    assert select(model, ("lm_head",)) == ["lm_head"]


def test_a_target_that_matches_nothing_names_the_candidates() -> None:
    with pytest.raises(InvalidInput) as error:
        select(tiny_llama(), ("q_prj", "v_proj"))
    assert error.value.what == "targets: ['q_prj'] matches no module of LlamaForCausalLM."
    assert error.value.remedy == (
        "Did you mean q_proj? Linear modules: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head."
    )
    with pytest.raises(InvalidInput) as error:
        select(tiny_llama(), "q_proj")  # one string is an expression over whole names
    assert error.value.remedy.startswith("Did you mean the list [q_proj]? Linear modules: ")
    with pytest.raises(InvalidInput) as error:
        select(tiny_llama(), ("nowhere",))
    assert error.value.remedy.startswith("Linear modules: ")
    with pytest.raises(InvalidInput, match=r"'\.\*attn' matches no module"):
        select(tiny_llama(), ".*attn")
    with pytest.raises(InvalidInput, match="not a regular expression"):
        select(tiny_llama(), "(q")
    with pytest.raises(InvalidInput, match=r"exclude: \['q_proj'\] leaves none of the targets"):
        select(tiny_llama(), ("q_proj",), exclude=("q_proj",))


def test_an_exclusion_that_matches_nothing_suggests_near_names() -> None:
    with pytest.raises(InvalidInput) as error:
        select(tiny_llama(), "all-linear", exclude=("up_proj", "q_porj"))
    assert error.value.what == "exclude: 'q_porj' is no module of LlamaForCausalLM."
    assert error.value.remedy == "Did you mean q_proj?"


@pytest.mark.parametrize(("method", "options"), [("lora", {"rank": 33}), ("dora", {"rank": 33}),
                                                 ("adalora", {"rank": 8, "initial_rank": 33})])  # fmt: skip
def test_a_rank_above_every_layer_is_refused(method: str, options: dict[str, int]) -> None:
    config = get_method(method).config_type(**options)
    with pytest.raises(InvalidInput, match="rank 33 is above that of every layer: the largest has 32"):
        get_method(method).attach(tiny_llama(), config, AttachContext(total_steps=100))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("method", "option"),
    [("lora-ga", "gamma"), ("cpt", "epsilon"), ("natural-galore", "damping"), ("ssf", "init_std"), ("eva", "rho")],
)
def test_options_are_finite(method: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match="finite number"):
        get_method(method).config_type(**{option: value})


def test_shapes_are_outputs_by_inputs_in_either_storage() -> None:
    assert shape(linear_modules(tiny_llama())["model.layers.0.mlp.up_proj"]) == (48, 32)
    assert shape(linear_modules(tiny_gpt2())["transformer.h.0.attn.c_attn"]) == (96, 32)


def test_peft_is_given_the_shortest_names_that_mean_exactly_the_same() -> None:
    llama, bert = tiny_llama(), tiny_bert()
    assert shortest(llama, select(llama, ("q_proj", "v_proj"))) == ["q_proj", "v_proj"]
    assert shortest(llama, select(llama, ("layers.0.self_attn.q_proj",))) == ["model.layers.0.self_attn.q_proj"]
    names = select(bert, r".*\d\.output\.dense")
    assert shortest(bert, names) == names  # 'dense' alone would be the pooler, too


def test_torchs_own_attention_is_left_alone() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert list(linear_modules(model)) == ["linear1", "linear2"]
