"""Language adapters against their equations, the counts of the fact sheet, and a planted language."""

import random
from collections.abc import Callable
from math import log
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from infra.errors import CorruptArtifact, InvalidInput, NotMergeable
from tests.tiny_models import PAD, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from tests.training.methods.backbones import BACKBONES, logits, train
from training.data.batching import Padding
from training.data.encoding import Encoded
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.methods.injected import PREFIX, InjectedAdapted
from training.methods.small_models_lrl import Nice
from training.objectives.masked_lm import MaskedLM
from training.options import TrainingOptions
from training.trainer import train as train_by_trainer

METHOD = get_method("small-models-lrl")
BATCH = BACKBONES["bert"].batch()


def tiny_masked(seed: int = 0, **changed: object) -> BertForMaskedLM:
    """The encoder of `tiny_bert` under a masked-LM head with tied embeddings."""
    config = BertConfig(**{**tiny_bert().config.to_dict(), "tie_word_embeddings": True, **changed})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForMaskedLM(config).eval()


def attached(model: nn.Module, steps: int = 0, **options: object) -> InjectedAdapted:
    adapted = METHOD.attach(model, METHOD.config_type(**{"reduction": 4, **options}), AttachContext(seed=3))
    train(adapted, BATCH, steps)
    return adapted


def zeroed(adapted: InjectedAdapted, *names: str) -> InjectedAdapted:
    """With the tensors so called set to zero."""
    held = adapted.tensors().items()
    adapted.restore({name: tensor * (name.rpartition(".")[2] not in names) for name, tensor in held})
    return adapted


def bottleneck(tensors: dict[str, Tensor], at: str) -> Callable[[Tensor], Tensor]:
    down, down_bias, up, up_bias = (tensors[f"{at}.{part}"] for part in ("down", "down_bias", "up", "up_bias"))
    return lambda z: torch.relu(z @ down.T + down_bias) @ up.T + up_bias


def test_a_post_norm_block_uses_the_bases_norm_twice() -> None:
    adapted = attached(tiny_bert(), steps=3)
    block = adapted.model.bert.encoder.layer[1]
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    block.output.register_forward_hook(lambda _, args, output: seen.append((*args, output)))
    logits(adapted.model, BATCH)
    ((inner, x, y),) = seen
    bare = tiny_bert().bert.encoder.layer[1].output
    a = bottleneck(adapted.tensors(), f"{PREFIX}bert.encoder.layer.1.output.LayerNorm")

    def norm(z: Tensor) -> Tensor:
        return functional.layer_norm(z, (32,), bare.LayerNorm.weight, bare.LayerNorm.bias, bare.LayerNorm.eps)

    summed = x + inner @ bare.dense.weight.T + bare.dense.bias
    assert_close(y, norm(summed + a(norm(summed))), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(y, norm(summed), atol=1e-3)


@pytest.mark.parametrize(
    ("build", "backbone", "blocks"),
    [
        (tiny_llama, "llama", ("model.layers.",)),
        (tiny_gpt2, "gpt2", ("transformer.h.",)),
        (tiny_vit, "vit", ("vit.layers.",)),
        (tiny_t5, "t5", ("encoder.block.", "decoder.block.")),
    ],
)
def test_a_pre_norm_block_is_followed_by_its_bottleneck(build: type, backbone: str, blocks: tuple[str, ...]) -> None:
    adapted = attached(build())
    adapted.restore({name: tensor + 0.05 for name, tensor in adapted.tensors().items()})
    assert list(adapted.slots()) == [f"{stack}{number}" for stack in blocks for number in (0, 1)]
    seen: dict[str, list[Tensor]] = {}
    for name, layer in adapted.layers().items():
        for module in (layer.base_layer, layer):
            module.register_forward_hook(
                lambda _, args, out, name=name: seen.setdefault(name, []).append(
                    out[0] if isinstance(out, tuple) else out
                )
            )
    logits(adapted.model, BACKBONES[backbone].batch())
    for name, (z, y) in seen.items():
        a = bottleneck(adapted.tensors(), PREFIX + name)
        assert_close(y, z + a(z), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(y, z, atol=1e-3)


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama, tiny_t5])
def test_a_fresh_adapter_changes_little_and_one_without_its_second_matrix_nothing(build: type) -> None:
    batch = BACKBONES["t5" if build is tiny_t5 else "bert"].batch()
    before = logits(build(), batch)
    adapted = attached(build())
    changed = (logits(adapted.model, batch) - before).abs().max()
    assert 0 < changed < 0.05 * before.abs().max()
    assert torch.equal(logits(zeroed(adapted, "up").model, batch), before)


def test_every_matrix_starts_normal_and_every_bias_at_zero() -> None:
    tensors = attached(tiny_masked(hidden_size=512), reduction=4, invertible=True).tensors()
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            assert not tensor.any()
        else:
            assert abs(tensor.std() - 0.02) < 0.001 and abs(tensor.mean()) < 0.001


@pytest.mark.parametrize("width", [32, 33])
def test_the_coupling_block_is_its_equations_and_its_inverse_undoes_it(width: int) -> None:
    torch.manual_seed(0)
    nice = Nice(width, "relu")
    for parameter in nice.parameters():
        nn.init.normal_(parameter, std=0.5)
    e, tensors = torch.randn(3, 7, width), nice.state_dict()
    F, G = bottleneck(tensors, "F"), bottleneck(tensors, "G")
    e1, e2 = e[..., : width // 2], e[..., width // 2 :]
    y1 = e1 + F(e2)
    y = torch.cat([y1, e2 + G(y1)], dim=-1)
    assert_close(nice(e), y)
    assert_close(nice.inverse(y), e, atol=1e-5, rtol=1e-5)
    assert (y - e).abs().max() > 0.1


def test_an_invertible_adapter_couples_embeddings_and_decouples_before_the_tied_head() -> None:
    adapted = attached(tiny_masked(), steps=3, invertible=True)
    tensors = adapted.tensors()
    assert {name for name in tensors if name.startswith("common.")} == {
        f"common.{net}.{part}" for net in "FG" for part in ("down", "down_bias", "up", "up_bias")
    }
    embeddings, head = adapted.model.bert.embeddings, adapted.model.cls.predictions.decoder
    assert embeddings.slots["default"].common is head.slots["default"].common
    seen: dict[str, Tensor] = {}
    embeddings.base_layer.register_forward_hook(lambda _, args, out: seen.update(e=out))
    embeddings.register_forward_hook(lambda _, args, out: seen.update(y=out))
    head.register_forward_hook(lambda _, args, out: seen.update(h=args[0], logits=out))
    both = logits(adapted.model, BATCH)
    F, G = bottleneck(tensors, "common.F"), bottleneck(tensors, "common.G")
    y1 = seen["e"][..., :16] + F(seen["e"][..., 16:])
    assert_close(seen["y"], torch.cat([y1, seen["e"][..., 16:] + G(y1)], dim=-1), atol=1e-5, rtol=1e-5)
    h2 = seen["h"][..., 16:] - G(seen["h"][..., :16])
    h1 = seen["h"][..., :16] - F(h2)
    bare = tiny_masked().cls.predictions.decoder
    assert_close(seen["logits"], torch.cat([h1, h2], dim=-1) @ bare.weight.T + bare.bias, atol=1e-5, rtol=1e-4)
    head.in_force = None
    assert (logits(adapted.model, BATCH) - both).abs().max() > 1e-2


def test_the_masked_objective_is_the_models_own_loss_through_an_inverted_head() -> None:
    adapted, batch = attached(tiny_masked(), steps=3, invertible=True), Padding(PAD)(sentences(0, 4, seed=0))
    judged = MaskedLM()(adapted.model, batch)
    assert_close(judged.total / judged.count, adapted.model(**batch).loss, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_decoder_generates_with_its_cache_what_it_generates_without(build: type) -> None:
    adapted = attached(build(), steps=3, invertible=True)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, plain = (adapted.model.generate(**BATCH, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    with adapted.disabled():
        assert not torch.equal(adapted.model.generate(**BATCH, **options), cached)


def test_a_language_adapter_moves_to_a_classifier_with_its_forward_half(tmp_path: Path) -> None:
    adapted = attached(tiny_masked(), steps=3, invertible=True)
    adapted.save(tmp_path)
    loaded = METHOD.load(tiny_bert(), tmp_path)
    assert loaded.tensors().keys() == adapted.tensors().keys()
    assert all(torch.equal(tensor, loaded.tensors()[name]) for name, tensor in adapted.tensors().items())
    assert set(adapted.slots()) - set(loaded.slots()) == {"cls.predictions.decoder"}


def test_the_counts_are_the_papers() -> None:
    def count(invertible: bool, reduction: int = 16, **config: int) -> int:
        with torch.device("meta"):
            model = BertForMaskedLM(BertConfig(**config))
        return METHOD.count(model, METHOD.config_type(invertible=invertible, reduction=reduction))

    small = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4}
    assert (count(False, **small), count(True, **small)) == (1_740, 3_884)
    assert (count(False), count(True)) == (894_528, 1_190_592)
    odd = tiny_masked(hidden_size=33, num_attention_heads=3)
    adapted = attached(odd, invertible=True)
    assert sum(p.numel() for p in adapted.trainable().values()) == METHOD.count(odd, adapted.config)


# -- training on masked tokens -----------------------------------------------------------------------------------------

MASK, FIRST, WORDS = 2, 10, 4


def sentences(language: int, number: int, seed: int) -> list[Encoded]:
    """Markov chains over the four words of a language, of which each stays nine times of ten; 3 of 16 are masked."""
    rng, made = random.Random(seed), []
    for _ in range(number):
        word, words = rng.randrange(WORDS), []
        for _ in range(16):
            word = word if rng.random() < 0.9 else rng.randrange(WORDS)
            words.append(FIRST + WORDS * language + word)
        masked = set(rng.sample(range(16), 3))
        made.append(
            Encoded(
                tuple(MASK if place in masked else word for place, word in enumerate(words)),
                tuple(word if place in masked else -100 for place, word in enumerate(words)),
            )
        )
    return made


def masked_loss(model: nn.Module, examples: list[Encoded]) -> float:
    batch = Padding(PAD)(examples)
    with torch.no_grad():
        scores = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    return functional.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100).item()


@pytest.mark.parametrize("invertible", [False, True])
def test_it_learns_a_planted_language_with_the_trainers_masked_objective(tmp_path: Path, invertible: bool) -> None:
    base = tiny_masked()
    optimiser = torch.optim.Adam(base.parameters(), lr=3e-3)
    for seed in range(80):  # the base knows the first language
        batch = Padding(PAD)(sentences(0, 32, seed))
        optimiser.zero_grad()
        base(**batch).loss.backward()
        optimiser.step()
    optimiser.zero_grad()
    known, foreign = sentences(0, 64, seed=1000), sentences(1, 64, seed=1001)
    before, unadapted = masked_loss(base, known), masked_loss(base, foreign)
    assert before < log(WORDS) < unadapted
    adapted = attached(base, invertible=invertible)
    options = TrainingOptions(steps=100, batch_size=32, learning_rate=1e-2, warmup_steps=5, checkpoint_every=100)
    train_by_trainer(
        adapted,
        MaskedLM(),
        sentences(1, 800, seed=2000),
        [],
        options,
        padding=Padding(PAD),
        seed=0,
        workdir=tmp_path,
        on_event=lambda event: None,
    )
    assert masked_loss(adapted.model, foreign) < unadapted / 2
    with adapted.disabled():
        assert masked_loss(adapted.model, known) == before  # the base is the very same


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_it_does_not_merge() -> None:
    with pytest.raises(NotMergeable):
        attached(tiny_masked(), invertible=True).merge()


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (tiny_t5, {"invertible": True}, "neither encoder nor decoder of tokens"),
        (tiny_vit, {"invertible": True}, "neither encoder nor decoder of tokens"),
        (tiny_bert, {"reduction": 33}, "A bottleneck of 32 / 33 has no width"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {}, "no stack of like blocks"),
    ],
)
def test_what_it_cannot_adapt_is_told(build: type, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        attached(build(), **options)


def test_an_adapter_of_another_model_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    attached(tiny_masked(), invertible=True).save(tmp_path)
    wider = tiny_masked(hidden_size=64)
    other = BertForSequenceClassification(BertConfig(**{**tiny_bert().config.to_dict(), "num_hidden_layers": 3}))
    for model, message in (
        (wider, "are no bottleneck for 64 → 64"),
        (other, r"layer\.2\.output\.LayerNorm is missing"),
        (tiny_t5(), "neither encoder nor decoder"),
    ):
        with pytest.raises(CorruptArtifact, match=f"do not fit .*{message}"):
            METHOD.load(model, tmp_path)
        assert not any("slots" in name for name, _ in model.named_modules())
