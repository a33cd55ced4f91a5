"""Compacter against Kronecker products written out, the paper's counts, and what sharing means."""

from math import pi, sqrt
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from transformers import T5Config, T5ForConditionalGeneration

from infra.errors import CorruptArtifact, InvalidInput
from tests.tiny_models import tiny_bert, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_t5
from tests.training.methods.backbones import BACKBONES, logits, loss, train
from tests.training.tiny_training import OPTIONS, copied, run, same_bits
from training.methods.catalog import get_method
from training.methods.compacter import Rule, transposed
from training.methods.contract import AttachContext
from training.methods.injected import PREFIX, InjectedAdapted
from training.options import TrainingOptions

METHOD = get_method("compacter")
BATCH = BACKBONES["llama"].batch()
RULE = "common.rule"


def attached(model: nn.Module, steps: int = 0, name: str = "default", **options: object) -> InjectedAdapted:
    config = METHOD.config_type(**{"reduction": 4, **options})
    adapted = METHOD.attach(model, config, AttachContext(seed=3), name)
    train(adapted, BACKBONES["t5"].batch() if isinstance(model, T5ForConditionalGeneration) else BATCH, steps)
    return adapted


def enlarged(adapted: InjectedAdapted) -> InjectedAdapted:
    """With a rule that is far from zero, so that everything is visible."""
    rule = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0))
    adapted.restore({**adapted.tensors(), RULE: rule})
    return adapted


def kronecker(rule: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """H [k, l]."""
    return sum(torch.kron(R, s_i @ t_i) for R, s_i, t_i in zip(rule, s, t, strict=True))  # type: ignore[return-value]


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("rank", [1, 2])
def test_the_matrix_is_the_sum_of_kronecker_products_with_the_rule_on_the_left(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rule, s, t = (torch.randn(shape, generator=generator) for shape in ((4, 4, 4), (4, 6, rank), (4, rank, 3)))
    H = kronecker(rule, s, t)
    assert H.shape == (24, 12)
    assert_close(transposed(rule, s, t), H.T, atol=1e-5, rtol=1e-5)
    swapped = sum(torch.kron(s_i @ t_i, R) for R, s_i, t_i in zip(rule, s, t, strict=True))
    assert not torch.allclose(H, swapped, atol=0.1)
    # Van Loan's rearrangement, a row for each element of a Kronecker factor: its rank is the number of products.
    rearranged = H.reshape(4, 6, 4, 3).permute(0, 2, 1, 3).reshape(16, 18)
    assert torch.linalg.matrix_rank(rearranged) == 4


@pytest.mark.parametrize(("build", "backbone"), [(tiny_llama, "llama"), (tiny_t5, "t5"), (tiny_gpt2, "gpt2")])
def test_an_adapter_is_its_equation_on_the_sub_layers_output(build: type, backbone: str) -> None:
    adapted = enlarged(attached(build(), steps=2))
    tensors = adapted.tensors()
    seen: dict[str, list[Tensor]] = {}
    for name, layer in adapted.layers().items():
        for module in (layer.base_layer, layer):
            module.register_forward_hook(lambda _, args, out, name=name: seen.setdefault(name, []).append(out))
    logits(adapted.model, BACKBONES[backbone].batch())
    adapters = [name for name in adapted.slots() if f"{PREFIX}{name}.up_s" in tensors]
    assert len(adapters) == (8 if build is tiny_t5 else 4)
    for name in adapters:
        h, y = seen[name]
        part = {key: tensors[f"{PREFIX}{name}.{key}"] for key in ("down_s", "down_t", "up_s", "up_t")}
        down_bias, up_bias = tensors[f"{PREFIX}{name}.down_bias"], tensors[f"{PREFIX}{name}.up_bias"]
        inner = gelu_new(h @ kronecker(tensors[RULE], part["down_s"], part["down_t"]) + down_bias)
        expected = h + inner @ kronecker(tensors[RULE], part["up_s"], part["up_t"]) + up_bias
        assert_close(y, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(y, h, atol=1e-2)


def test_the_places_are_self_attention_and_feed_forward_but_not_cross_attention() -> None:
    def linear(model: nn.Module, **options: object) -> set[str]:
        return {n.partition(".block.")[2] for n in attached(model, layer_norms=False, **options).slots()}

    feedforward = {f"{n}.layer.{layer}.DenseReluDense.wo" for n in (0, 1) for layer in (1, 2)}
    assert linear(tiny_t5()) == feedforward | {f"{n}.layer.0.SelfAttention.o" for n in (0, 1)}
    assert linear(tiny_t5(), attention=False) == feedforward
    bert = attached(tiny_bert(), layer_norms=False)
    parts = ("attention.output.dense", "output.dense")
    assert set(bert.slots()) == {f"bert.encoder.layer.{n}.{part}" for n in (0, 1) for part in parts}


def test_the_counts_of_t5_base_are_the_papers() -> None:
    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)

    def count(**options: object) -> int:
        return METHOD.count(model, METHOD.config_type(**options))

    assert count() == 161_728  # 0.073 % of 222.9 million
    assert count(attention=False) == 104_704  # 0.047 %
    assert count(layer_norms=False) == 161_728 - 62 * 768
    assert round(100 * 161_728 / sum(p.numel() for p in model.parameters()), 4) == 0.0726


def test_the_rule_is_one_parameter_of_the_whole_adapter(tmp_path: Path) -> None:
    adapted = attached(tiny_llama(), steps=2)
    adapted.save(tmp_path)
    loaded = METHOD.load(tiny_llama(), tmp_path)
    for one in (adapted, loaded):
        rules = {id(slot.common.rule) for slot in one.slots().values()}
        assert len(rules) == 1
        assert sum(id(parameter) in rules for parameter in one.trainable().values()) == 1
        assert [name for name in one.tensors() if "rule" in name] == [RULE]
        assert one.tensors()[RULE].data_ptr() == one.common().rule.data_ptr()


def test_the_rules_gradient_is_the_sum_of_those_of_its_layers() -> None:
    shared, apart = enlarged(attached(tiny_llama())), enlarged(attached(tiny_llama()))
    for slot in apart.slots().values():
        own = Rule(4, 0.0)
        own.rule.data.copy_(slot.common.rule.data)
        slot.common = own
    loss(shared.model, BATCH).backward()
    loss(apart.model, BATCH).backward()
    adapters = [slot for slot in apart.slots().values() if slot.common.rule.grad is not None]
    parts = torch.stack([slot.common.rule.grad for slot in adapters])
    assert len(adapters) == 4 and (parts.flatten(1).norm(dim=1) > 1e-4).all()
    assert_close(shared.common().rule.grad, parts.sum(dim=0), atol=1e-5, rtol=1e-4)


def test_a_fresh_adapter_is_nearly_nothing_and_with_a_rule_of_zero_nothing() -> None:
    tensors = attached(tiny_llama(), division=4).tensors()
    rule = attached(tiny_llama(), division=8, reduction=4).tensors()[RULE]
    assert abs(rule.std() - 1e-4) < 1e-5 and abs(rule.mean()) < 2e-5
    place = f"{PREFIX}model.layers.0.mlp.down_proj"
    for side, inputs, outputs in (("down", 32, 8), ("up", 8, 32)):
        s, t = tensors[f"{place}.{side}_s"], tensors[f"{place}.{side}_t"]
        assert s.shape == (4, inputs // 4, 1) and t.shape == (4, 1, outputs // 4)
        for factor, fan in ((s, inputs // 4 + 1), (t, outputs // 4 + 1)):
            bound = sqrt(2) * sqrt(6 / fan)  # Glorot's, times the gain
            assert 0.6 * bound < factor.abs().max() <= bound
        assert not tensors[f"{place}.{side}_bias"].any()
    h = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    slot = attached(tiny_llama()).slots()["model.layers.0.mlp.down_proj"]
    assert 0 < slot.bottleneck(h, slot.common).norm() < 1e-3 * h.norm()
    nothing = attached(tiny_llama(), rule_spread=0.0)
    assert torch.equal(logits(nothing.model, BATCH), logits(tiny_llama(), BATCH))


def test_it_fits_a_matrix_of_its_own_structure_which_a_rank_one_factorisation_cannot() -> None:
    generator = torch.Generator().manual_seed(2)

    def drawn() -> list[Tensor]:
        return [torch.randn(shape, generator=generator) for shape in ((4, 4, 4), (4, 4, 1), (4, 1, 4))]

    H = kronecker(*drawn())
    H = H / H.norm()
    assert torch.linalg.svdvals(H)[1:].pow(2).sum() > 0.3  # what every matrix of rank one misses
    for _ in range(6):  # starts: the problem is not convex
        fitted = [tensor.mul_(0.5).requires_grad_() for tensor in drawn()]
        optimiser = torch.optim.LBFGS(fitted, max_iter=400, history_size=50, line_search_fn="strong_wolfe")

        def closure(fitted: list[Tensor] = fitted) -> Tensor:
            for tensor in fitted:
                tensor.grad = None
            error = (transposed(*fitted) - H.T).pow(2).sum()
            error.backward()
            return error

        optimiser.step(closure)
        if closure() < 1e-5:
            return
    pytest.fail("no start came to the planted matrix")


@pytest.mark.parametrize("build", [tiny_bert, tiny_gemma3, tiny_t5])
def test_every_norm_trains_as_a_copy_and_the_bases_stays(build: type) -> None:
    adapted = attached(build(), steps=3)
    bare = build()
    norms = {name for name, module in bare.named_modules() if type(module).__name__.endswith("Norm")}
    stored = {name for name in norms if f"{PREFIX}{name}.weight" in adapted.tensors()}
    assert stored == norms and len(norms) >= 5
    for name in norms:
        trained, kept = adapted.tensors()[f"{PREFIX}{name}.weight"], bare.get_submodule(name).weight
        assert not torch.equal(trained, kept)
        assert torch.equal(adapted.model.get_submodule(name).base_layer.weight, kept)
    second = attached(adapted.model, name="second")  # starts from the base's norms, not from those that were trained
    name = sorted(norms)[0]
    assert torch.equal(second.tensors()[f"{PREFIX}{name}.weight"], bare.get_submodule(name).weight)


def test_a_trained_norm_is_the_norm_with_the_trained_weights() -> None:
    adapted = attached(tiny_bert(), steps=3)
    name = "bert.encoder.layer.0.output.LayerNorm"
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    weight, bias = (adapted.tensors()[f"{PREFIX}{name}.{part}"] for part in ("weight", "bias"))
    layer = adapted.model.get_submodule(name)
    assert_close(layer(x), functional.layer_norm(x, (32,), weight, bias, layer.base_layer.eps))


def test_the_matrices_are_float32_under_autocast() -> None:
    adapted = enlarged(attached(tiny_llama()))
    slot = adapted.slots()["model.layers.0.mlp.down_proj"]
    exact = slot.bottleneck.weights(slot.common)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = slot.bottleneck.weights(slot.common)
        shown = adapted.model(**BATCH).logits
    assert all(torch.equal(one, other) for one, other in zip(exact, inside, strict=True))
    assert torch.isfinite(shown).all()


def test_a_training_that_crashed_resumes_to_the_same_bits(tmp_path: Path) -> None:
    options = TrainingOptions.model_validate({**OPTIONS.model_dump(), "steps": 8, "checkpoint_every": 3})

    def crash(event: object) -> None:
        if event.step == 5:  # type: ignore[attr-defined]
            raise RuntimeError("the power is gone")

    whole, _ = run(tmp_path / "whole", options, attached(tiny_llama()))
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "broken", options, attached(tiny_llama()), on_event=crash)
    resumed, outcome = run(tmp_path / "broken", options, attached(tiny_llama()))
    assert outcome.steps == 8 and not same_bits(copied(attached(tiny_llama())), copied(whole))
    assert same_bits(copied(resumed), copied(whole))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"division": 3}, "may leave a rest when divided by 3"),
        ({"reduction": 16}, r"bottleneck 32 / 16 = 2 may leave a rest when divided by 4"),
        ({"reduction": 64}, r"32 / 64 = 0"),
    ],
)
def test_sizes_that_do_not_divide_are_told(options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        attached(tiny_llama(), **options)


def test_a_model_of_no_known_family_is_refused() -> None:
    with pytest.raises(InvalidInput, match="does not know which layers of Sequential are its feed-forward layers"):
        attached(nn.Sequential(nn.Linear(4, 4)))


def test_an_adapter_without_its_rule_or_of_another_depth_is_refused(tmp_path: Path) -> None:
    adapted = attached(tiny_llama())
    with pytest.raises(CorruptArtifact, match=r"common\.rule is missing"):
        adapted.restore({name: tensor for name, tensor in adapted.tensors().items() if name != RULE})
    adapted.save(tmp_path)
    with pytest.raises(CorruptArtifact, match="is missing or not adapted"):
        METHOD.load(tiny_llama(layers=3), tmp_path)
    with pytest.raises(CorruptArtifact, match="there is no layer model"):
        METHOD.load(tiny_gpt2(), tmp_path)
