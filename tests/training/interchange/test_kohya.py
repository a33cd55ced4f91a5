"""kohya files: names without dots, resolved against the base; diffusers' own conversion where it is installed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from infra.errors import BaseModelMismatch, CorruptArtifact, InvalidInput, RegraftError
from tests.training.interchange.strategies import assert_same, bare_model, loras
from training.interchange.kohya import layers_from_kohya, layers_to_kohya
from training.interchange.lora_layers import LoraLayer, LoraLayers, layers_to_peft

Q = "model_layers_0_self_attn_q_proj"


@settings(max_examples=50)
@given(loras(), st.sampled_from(["lora_te", "lora_unet", "lora_te2"]))
def test_what_is_written_is_read_again(layers: LoraLayers, prefix: str) -> None:
    assert_same(layers_from_kohya(layers_to_kohya(layers, prefix), bare_model("llama")), layers)


def test_the_file_says_it_as_kohya_does() -> None:
    layer = LoraLayer(torch.ones(4, 32), torch.ones(32, 4), 0.5)
    tensors = layers_to_kohya({"model.layers.0.self_attn.q_proj": layer})
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        f"lora_te_{Q}.lora_down.weight": (4, 32),
        f"lora_te_{Q}.lora_up.weight": (32, 4),
        f"lora_te_{Q}.alpha": (),
    }
    assert float(tensors[f"lora_te_{Q}.alpha"]) == 2.0


class Colliding(nn.Module):
    """Two layers whose names differ in where the dots are."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleDict({"block_attn": nn.Linear(4, 4), "block": nn.ModuleDict({"attn": nn.Linear(4, 4)})})
        self.other = nn.Linear(4, 4)


PLACES = ("up.block_attn", "up.block.attn")


@given(st.sampled_from(PLACES))
def test_a_name_that_two_layers_could_have_is_refused_on_reading(place: str) -> None:
    tensors = layers_to_kohya({place: LoraLayer(torch.ones(1, 4), torch.ones(4, 1))})
    with pytest.raises(BaseModelMismatch, match=r"may be up\.block_attn or up\.block\.attn"):
        layers_from_kohya(tensors, Colliding())


def test_two_layers_of_one_name_are_refused_on_writing() -> None:
    layer = LoraLayer(torch.ones(1, 4), torch.ones(4, 1))
    with pytest.raises(
        InvalidInput, match=r"up\.block_attn and up\.block\.attn would both be called lora_te_up_block_attn"
    ):
        layers_to_kohya(dict.fromkeys(PLACES, layer))


def test_a_file_without_alpha_means_a_scale_of_one() -> None:
    tensors = layers_to_kohya({"model.layers.0.self_attn.q_proj": LoraLayer(torch.ones(4, 32), torch.ones(32, 4), 0.5)})
    del tensors[f"lora_te_{Q}.alpha"]
    (layer,) = layers_from_kohya(tensors, bare_model("llama")).values()
    assert layer.scale == 1.0


def file(**changed: Tensor) -> dict[str, Tensor]:
    down, up = f"lora_te_{Q}.lora_down.weight", f"lora_te_{Q}.lora_up.weight"
    return {down: torch.ones(2, 32), up: torch.ones(32, 2)} | changed


@pytest.mark.parametrize(
    ("changed", "part", "kind", "told"),
    [
        (
            {"lora_unet_mid.lora_down.weight": torch.ones(2, 3)},
            None,
            InvalidInput,
            "several parts of a pipeline: lora_te",
        ),
        ({}, "lora_unet", InvalidInput, "no part lora_unet; it holds lora_te"),
        ({f"lora_te_{Q}.dora_scale": torch.ones(32)}, None, InvalidInput, "another method of LyCORIS"),
        ({f"lora_te_{Q}.hada_w1_a": torch.ones(2)}, None, InvalidInput, "another method of LyCORIS"),
        ({f"lora_te_{Q}.lora_down.weight": torch.ones(2, 32, 3, 3)}, None, InvalidInput, "as a convolution"),
        ({"lora_te_nowhere.lora_down.weight": torch.ones(2, 32)}, None, CorruptArtifact, "one factor of the two"),
        ({f"lora_te_{Q}.alpha": torch.tensor(float("inf"))}, None, CorruptArtifact, "no finite number"),
        ({f"lora_te_{Q}.alpha": torch.ones(2)}, None, CorruptArtifact, "no finite number"),
        ({"lora_te_x.alpha": torch.ones(())}, None, CorruptArtifact, "an alpha and no factors"),
        ({"model.layers.0.lora_down.weight": torch.ones(2, 32)}, None, InvalidInput, "no name of a kohya file"),
        (
            {"lora_te_x.lora_down.weight": torch.ones(2, 3), "lora_te_x.lora_up.weight": torch.ones(3, 2)},
            None,
            BaseModelMismatch,
            "no linear layer that x could mean",
        ),
    ],
)
def test_what_is_no_plain_lora_of_this_base_is_refused(
    changed: dict[str, Tensor], part: str | None, kind: type[Exception], told: str
) -> None:
    with pytest.raises(kind, match=told):
        layers_from_kohya(file(**changed), bare_model("llama"), part)


def test_of_several_parts_one_is_chosen() -> None:
    tensors = file(**{"lora_unet_mid.lora_down.weight": torch.ones(2, 3)})
    assert list(layers_from_kohya(tensors, bare_model("llama"), "lora_te")) == ["model.layers.0.self_attn.q_proj"]


@settings(max_examples=100)
@given(
    st.dictionaries(
        st.from_regex(r"(lora_te_|lora_|x)?[a-z_]{0,12}(\.[a-z_]{0,12}){0,3}", fullmatch=True),
        st.sampled_from([torch.ones(()), torch.ones(2), torch.ones(2, 32), torch.ones(32, 2), torch.ones(0, 3)]),
        max_size=4,
    )
)
def test_whatever_a_file_holds_is_read_or_refused_in_words(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(RegraftError):
        layers_from_kohya(tensors, bare_model("llama"))


@settings(max_examples=10)
@given(loras())
def test_diffusers_own_conversion_writes_the_same_names_and_factors(layers: LoraLayers) -> None:
    convert = pytest.importorskip("diffusers.utils.state_dict_utils").convert_state_dict_to_kohya
    _, tensors = layers_to_peft(layers, bare_model("llama"))
    theirs = convert({name.replace("base_model.model.", "text_encoder."): t for name, t in tensors.items()})
    ours = layers_to_kohya(layers, "lora_te1")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours if not name.endswith(".alpha"))
    for place, layer in layers.items():  # they write α = r whatever it was; ours keeps it
        alpha = f"lora_te1_{place.replace('.', '_')}.alpha"
        assert int(theirs[alpha]) == layer.rank
        assert float(ours[alpha]) == pytest.approx(layer.scale * layer.rank)
