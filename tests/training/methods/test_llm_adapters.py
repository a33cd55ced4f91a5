"""Series and parallel adapters against their equations, the paper's counts, and a plain LoRA."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from infra.errors import CorruptArtifact, InvalidInput
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from tests.training.methods.backbones import BACKBONES, logits, train
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.methods.injected import PREFIX, InjectedAdapted

METHOD = get_method("llm-adapters")
BATCH = BACKBONES["llama"].batch()


def attached(model: nn.Module, steps: int = 0, **options: object) -> InjectedAdapted:
    adapted = METHOD.attach(model, METHOD.config_type(**{"bottleneck": 5, **options}), AttachContext(seed=3))
    train(adapted, BATCH, steps)
    return adapted


def observed(adapted: InjectedAdapted) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every adapted layer, from one forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, output, name=name: seen.update({name: (args[0], output)}))
        for name, layer in adapted.layers().items()
    ]
    logits(adapted.model, BATCH)
    for hook in hooks:
        hook.remove()
    return seen


def part(adapted: InjectedAdapted, layer: str, name: str) -> Tensor:
    return adapted.tensors()[f"{PREFIX}{layer}.{name}"]


@pytest.mark.parametrize("options", [{"scale": 0.5}, {"scale": "learned"}, {"activation": "relu", "init": "mam"}])
@pytest.mark.parametrize(
    ("build", "series_before", "series_after"),
    [
        (tiny_llama, ("gate_proj", "up_proj"), ("down_proj", "q_proj", "k_proj", "v_proj", "o_proj")),
        (tiny_gpt2, ("c_fc", "c_attn"), ("mlp.c_proj", "attn.c_proj")),
    ],
)
def test_every_placement_is_its_equation(
    build: type, series_before: tuple[str, ...], series_after: tuple[str, ...], options: dict[str, object]
) -> None:
    phi = torch.relu if "activation" in options else torch.tanh
    for placement in ("series", "parallel"):
        adapted = attached(build(), steps=3, placement=placement, targets="all-linear", **options)
        bare, kinds = build(), set()
        for name, (x, y) in observed(adapted).items():
            W, c = bare.get_submodule(name).weight, bare.get_submodule(name).bias
            W = W if build is tiny_llama else W.T
            c = torch.zeros(len(W)) if c is None else c
            D, E = part(adapted, name, "down"), part(adapted, name, "up")
            s = part(adapted, name, "scale") if options.get("scale") == "learned" else options.get("scale", 1.0)

            def added(z: Tensor, D: Tensor = D, E: Tensor = E, s: object = s) -> Tensor:
                return s * (phi(z @ D.T) @ E.T)

            if placement == "parallel":
                expected, kind = x @ W.T + c + added(x), "beside"
            elif name.endswith(series_before):
                expected, kind = (x + added(x)) @ W.T + c, "before"
            else:
                assert name.endswith(series_after)
                h = x @ W.T + c
                expected, kind = h + added(h), "after"
            assert_close(y, expected, atol=2e-5, rtol=1e-5)
            assert not torch.allclose(y, x @ W.T + c, atol=1e-3)
            kinds.add(kind)
        assert kinds == ({"before", "after"} if placement == "series" else {"beside"})


def test_the_default_places_are_those_of_the_placement_study() -> None:
    def last_parts(model: nn.Module, placement: str) -> set[str]:
        return {".".join(name.split(".")[-2:]) for name in attached(model, placement=placement).slots()}

    assert last_parts(tiny_llama(), "series") == {"mlp.down_proj"}
    assert last_parts(tiny_llama(), "parallel") == {"mlp.up_proj", "mlp.down_proj"}
    assert last_parts(tiny_gpt2(), "parallel") == {"mlp.c_fc", "mlp.c_proj"}
    assert last_parts(tiny_t5(), "parallel") == {"DenseReluDense.wi_1", "DenseReluDense.wo"}
    names = attached(tiny_bert(), placement="parallel").slots()
    assert set(names) == {f"bert.encoder.layer.{n}.{part}.dense" for n in (0, 1) for part in ("intermediate", "output")}


def test_the_counts_of_llama_7b_are_the_papers() -> None:
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    base = sum(parameter.numel() for parameter in model.parameters())

    def count(**options: object) -> int:
        return METHOD.count(model, METHOD.config_type(**options))

    assert count() == 32 * 2 * 4096 * 256
    assert round(100 * count() / (base + count()), 2) == 0.99
    parallel = count(placement="parallel")
    assert round(100 * parallel / (base + parallel), 2) == 3.54
    assert count(targets=("gate_proj", "up_proj", "down_proj")) == 201_326_592
    assert count(scale="learned") == count() + 32


def test_the_start_is_the_declared_one() -> None:
    bert = attached(tiny_llama(), bottleneck=256)
    for name in bert.slots():
        for side in ("down", "up"):
            values = part(bert, name, side)
            assert abs(values.std() - 0.02) < 0.001 and abs(values.mean()) < 0.001
    assert not torch.equal(logits(bert.model, BATCH), logits(tiny_llama(), BATCH))
    mam = attached(tiny_llama(), bottleneck=256, init="mam")
    for name in mam.slots():
        down = part(mam, name, "down")
        bound = 1 / down.shape[1] ** 0.5  # Kaiming with a = √5
        assert 0.95 * bound < down.abs().max() <= bound and abs(down.std() - bound / 3**0.5) < 0.05 * bound
    assert torch.equal(logits(mam.model, BATCH), logits(tiny_llama(), BATCH))


def test_without_a_nonlinearity_parallel_is_a_lora_and_series_a_change_of_the_weight() -> None:
    options = {"activation": "linear", "scale": 0.25, "targets": ("down_proj", "q_proj")}
    stock = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=1, target_modules=["down_proj", "q_proj"]))
    parallel = attached(tiny_llama(), steps=3, placement="parallel", bottleneck=4, **options)
    state = {}
    for name in parallel.slots():
        state[f"{PREFIX}{name}.lora_A.default.weight"] = part(parallel, name, "down")
        state[f"{PREFIX}{name}.lora_B.default.weight"] = part(parallel, name, "up")
    assert not stock.load_state_dict(state, strict=False).unexpected_keys
    assert_close(logits(parallel.model, BATCH), logits(stock, BATCH), atol=1e-6, rtol=1e-6)

    series, bare = attached(tiny_llama(), steps=3, **options), tiny_llama()
    for name in series.slots():
        weight = bare.get_submodule(name).weight
        change = 0.25 * part(series, name, "up") @ part(series, name, "down")
        weight.data = (torch.eye(len(weight)) + change) @ weight.data
    assert_close(logits(series.model, BATCH), logits(bare, BATCH), atol=1e-5, rtol=1e-5)


class Planted(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_parallel_adapter_learns_what_no_change_of_the_weight_can() -> None:
    generator = torch.Generator().manual_seed(0)
    x, u, v = (torch.randn(shape, generator=generator) for shape in ((256, 6), (6,), (4,)))
    torch.manual_seed(0)
    model = Planted()
    target = model(x).detach() + torch.tanh(2 * x @ u)[:, None] * v
    design = torch.cat([x, torch.ones(256, 1)], dim=1)
    best_linear = design @ torch.linalg.lstsq(design, target).solution  # the floor of every LoRA, of whatever rank
    floor = (best_linear - target).pow(2).mean()
    adapted = attached(model, placement="parallel", bottleneck=8, targets=("layer",))
    optimiser = torch.optim.Adam(adapted.trainable().values(), lr=0.02)
    for _ in range(1500):
        optimiser.zero_grad()
        error = (adapted.model(x) - target).pow(2).mean()
        error.backward()
        optimiser.step()
    assert error < 0.02 * floor and floor > 0.05


def test_dropout_is_off_in_evaluation_and_never_touches_the_base() -> None:
    adapted = attached(tiny_llama(), steps=3, dropout=0.9, placement="parallel")
    assert torch.equal(logits(adapted.model, BATCH), logits(adapted.model, BATCH))
    adapted.model.train()
    assert not torch.equal(logits(adapted.model, BATCH), logits(adapted.model, BATCH))
    with adapted.disabled():
        assert torch.equal(logits(adapted.model, BATCH), logits(tiny_llama(), BATCH))


def test_what_is_stored_is_the_bottlenecks_alone_and_the_base_layers_are_the_very_same() -> None:
    model = tiny_llama()
    layers = [block.mlp.down_proj for block in model.model.layers]
    adapted = attached(model, scale="learned")
    names = [f"{PREFIX}model.layers.{n}.mlp.down_proj.{name}" for n in (0, 1) for name in ("down", "up", "scale")]
    assert sorted(adapted.tensors()) == sorted(names)
    assert [layer.base_layer for layer in adapted.layers().values()] == layers


def test_a_model_without_known_feed_forward_layers_must_be_told() -> None:
    with pytest.raises(InvalidInput, match=r"does not know which layers of Planted.*\n.*targets.*layer"):
        attached(Planted())
    with pytest.raises(InvalidInput, match="matches no module"):
        attached(tiny_llama(), targets=("dwon_proj",))
    with pytest.raises(ValueError, match="activation"):
        METHOD.config_type(activation="sine")


def test_a_stored_adapter_of_another_width_is_refused(tmp_path: Path) -> None:
    attached(tiny_llama()).save(tmp_path)
    wide = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
    wider = LlamaForCausalLM(LlamaConfig(**{**tiny_llama().config.to_dict(), **wide}))
    with pytest.raises(CorruptArtifact, match=r"down_proj: \(5, 32\) and \(32, 5\) are no bottleneck for 64 → 64"):
        METHOD.load(wider, tmp_path)
    deeper = tiny_llama(layers=3)
    with pytest.raises(CorruptArtifact, match=r"layers\.2\.mlp\.down_proj is missing"):
        METHOD.load(deeper, tmp_path)
    assert not any("slots" in name for name, _ in deeper.named_modules())
