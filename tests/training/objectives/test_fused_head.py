"""The loss of a head that makes no logits, against the same model with logits, whatever is done to them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from kernels import linear_cross_entropy as kernel
from kernels.cross_entropy import IGNORE
from tests.tiny_models import PAD, VOCABULARY, tiny_bert, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_t5
from tests.training.objectives.test_distillation import of_teacher
from tests.training.objectives.test_labelled_positions import examples
from training.data.batching import Padding
from training.data.encoding import Encoded
from training.objectives.causal_lm import CausalLM
from training.objectives.distillation import Distillation, SoftPadding
from training.objectives.masked_lm import MaskedLM
from training.objectives.objective import Loss, Objective
from training.objectives.sequence_to_sequence import SequenceToSequence

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return make().eval()


def bart() -> nn.Module:
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        pad_token_id=PAD,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return seeded(lambda: BartForConditionalGeneration(config))


CAUSAL = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "gemma3": tiny_gemma3,
    "gemma2, capped": lambda: seeded(lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0))),
    "cohere, scaled": lambda: seeded(lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25))),
    "granite, divided": lambda: seeded(lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0))),
}
CASES: dict[str, tuple[Callable[[], nn.Module], Objective, dict[str, Tensor]]] = {
    **{name: (model, CausalLM(), Padding(PAD)(examples())) for name, model in CAUSAL.items()},
    **{
        f"{name}, distilled": (model, Distillation(2.0, 0.5), SoftPadding(PAD)(of_teacher(6)))
        for name, model in CAUSAL.items()
    },
    "bert": (lambda: seeded(lambda: BertForMaskedLM(tiny_bert().config)), MaskedLM(), Padding(PAD)(examples())),
    "t5": (tiny_t5, SequenceToSequence(), Padding(PAD)([Encoded((4, 5, 6, 2), (9, 8, 2)), Encoded((7, 2), (5, 2))])),
    "bart": (bart, SequenceToSequence(), Padding(PAD)([Encoded((4, 5, 6, 2), (9, 8, 2)), Encoded((7, 2), (5, 2))])),
}


def with_logits(model: nn.Module, objective: Objective, batch: dict[str, Tensor]) -> Loss:
    """The same by a head that is listened to, which keeps its logits."""
    handle = model.get_output_embeddings().register_forward_hook(lambda *told: None)
    try:
        return objective(model, batch)
    finally:
        handle.remove()


def gradients(model: nn.Module, loss: Loss) -> dict[str, Tensor]:
    model.zero_grad()
    loss.total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, objective: Objective, batch: dict[str, Tensor], fused: bool = True) -> None:
    for _ in range(2):  # seen for the first time, and known
        ours, theirs = objective(model, batch), with_logits(model, objective, batch)
        assert ours.count == theirs.count
        assert ours.outputs.logits.shape[1] == (0 if fused else ours.count)
        assert ours.outputs.logits.shape[2] == VOCABULARY
        torch.testing.assert_close(ours.total, theirs.total, rtol=1e-6, atol=0)
        of_ours, of_theirs = gradients(model, ours), gradients(model, theirs)
        assert of_ours and of_ours.keys() == of_theirs.keys()
        largest = max(gradient.abs().max().item() for gradient in of_theirs.values())
        for name, gradient in of_ours.items():  # some, as of the bias of keys, are nothing but rounding
            torch.testing.assert_close(gradient, of_theirs[name], rtol=1e-5, atol=8e-6 * largest, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_logits_all_weights_trained(name: str) -> None:
    make, objective, batch = CASES[name]
    assert_same(make(), objective, batch)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_logits_under_lora(name: str) -> None:
    make, objective, batch = CASES[name]
    torch.manual_seed(6)
    targets = r".*(q_proj|v_proj|c_attn|query|value|\.q|\.v)$"
    assert_same(
        get_peft_model(make(), LoraConfig(target_modules=targets, r=2, init_lora_weights=False)), objective, batch
    )


@pytest.mark.parametrize("objective", [CausalLM(), Distillation(2.0, 0.5)])
def test_an_adapted_head_keeps_its_logits(objective: Objective) -> None:
    torch.manual_seed(6)
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False))
    assert_same(model, objective, SoftPadding(PAD)(of_teacher(6)), fused=False)


def test_a_replaced_head_keeps_its_logits() -> None:
    model = tiny_llama()
    forward, mask = model.lm_head.forward, torch.randn(VOCABULARY)
    model.lm_head.forward = lambda hidden: forward(hidden) + mask
    assert_same(model, CausalLM(), Padding(PAD)(examples()), fused=False)


class Tilted(type(tiny_llama())):  # type: ignore[misc]
    """Does to its logits what no configuration tells of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits - 0.5 * torch.arange(outputs.logits.shape[-1]) / VOCABULARY
        return outputs


def tilted() -> nn.Module:
    model = tiny_llama()
    model.__class__ = Tilted
    return model


@pytest.mark.parametrize("objective", [CausalLM(), Distillation(2.0, 0.5)])
def test_a_model_that_does_something_else_to_its_logits_is_found_out_and_keeps_them(objective: Objective) -> None:
    assert_same(tilted(), objective, SoftPadding(PAD)(of_teacher(6)), fused=False)


def test_a_bias_that_a_model_adds_to_its_logits_is_found_out() -> None:
    _, objective, batch = CASES["bart"]
    model = bart()
    model.final_logits_bias.normal_(std=1e-3)
    assert_same(model, objective, batch, fused=False)


def test_what_changes_a_model_later_is_found_out() -> None:
    model, batch = tiny_llama(), Padding(PAD)(examples())
    assert_same(model, CausalLM(), batch)
    handle = model.register_forward_hook(lambda model, args, outputs: setattr(outputs, "logits", -outputs.logits))
    assert_same(model, CausalLM(), batch, fused=False)
    handle.remove()
    model.config.final_logit_softcapping = 3.0  # which a Llama does not do
    assert_same(model, CausalLM(), batch, fused=False)


def test_finding_out_takes_no_random_numbers() -> None:
    batch = Padding(PAD)(examples())

    def draws(model: nn.Module) -> Tensor:
        model.train().model.layers[0].mlp.act_fn = nn.Dropout(0.5)
        torch.manual_seed(1)
        return CausalLM()(model, batch).total.detach()

    known = tilted()
    CausalLM()(known, batch)
    torch.testing.assert_close(draws(tilted()), draws(known), rtol=0, atol=0)


def test_validation_makes_neither_logits_nor_gradients() -> None:
    model, batch = tiny_llama(), Padding(PAD)(examples())
    expected = CausalLM()(model, batch).total
    with torch.no_grad():
        found = CausalLM()(model, batch)
    assert not found.total.requires_grad and found.outputs.logits.shape[1] == 0
    torch.testing.assert_close(found.total, expected.detach(), rtol=1e-6, atol=0)


class Largest(TorchDispatchMode):
    """Notes the most elements of anything that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, list | tuple) else (outputs,):
            if isinstance(output, Tensor):
                self.elements = max(self.elements, output.numel())
        return outputs


@pytest.mark.parametrize("objective", [CausalLM(), Distillation(2.0, 0.5)])
def test_a_training_step_never_has_all_logits(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles of 16 × 16 nothing is larger than the head itself, whose 259 × 32 are fewer than 259 × 40 logits."""
    monkeypatch.setattr(kernel, "_CPU_TILE", 16)
    ids = tuple(torch.randint(3, VOCABULARY, (60,), generator=torch.Generator().manual_seed(0)).tolist())
    batch = Padding(PAD)([Encoded(ids, ids)])
    batch["soft_tokens"], batch["soft_logits"] = torch.arange(5).expand(59, 5), torch.randn(59, 5)
    if isinstance(objective, CausalLM):
        batch = {name: tensor for name, tensor in batch.items() if not name.startswith("soft")}
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2))
    for judge, all_logits in ((objective, False), (lambda *given: with_logits(given[0], objective, given[1]), True)):
        with Largest() as largest:
            judge(model, batch).total.backward()
        assert (largest.elements >= 59 * VOCABULARY) == all_logits
    assert IGNORE not in batch["labels"][:, 1:60]
