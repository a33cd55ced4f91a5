"""The loss at labelled positions against the model's own full-logits loss, for each architecture and wrapper."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BertConfig, BertForMaskedLM, Gemma3ForCausalLM, Gemma3TextConfig

from infra.errors import InvalidInput
from tests.tiny_models import PAD, VOCABULARY, tiny_bert, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_t5
from training.data.batching import Padding
from training.data.encoding import Encoded
from training.objectives.causal_lm import CausalLM
from training.objectives.classification import Classification
from training.objectives.masked_lm import MaskedLM
from training.objectives.sequence_to_sequence import SequenceToSequence

IGNORE = -100


def soft_capped_gemma3() -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(**{**tiny_gemma3().config.to_dict(), "final_logit_softcapping": 0.5})
    torch.manual_seed(3)
    return Gemma3ForCausalLM(config).eval()


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gemma3": tiny_gemma3, "gemma3-capped": soft_capped_gemma3}


def examples(seed: int = 0, number: int = 3) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(number):
        ids = torch.randint(3, VOCABULARY, (7 + 3 * index,), generator=generator).tolist()
        made.append(Encoded(tuple(ids), (*[IGNORE] * (3 + index), *ids[3 + index :])))
    return made


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_loss_and_gradients(model: torch.nn.Module, objective: object, batch: dict[str, torch.Tensor]) -> None:
    loss = objective(model, batch)
    (loss.total / loss.count).backward()
    ours = gradients(model)
    model.zero_grad()
    theirs_loss = model(**batch).loss
    theirs_loss.backward()
    theirs = gradients(model)
    assert abs((loss.total / loss.count).item() - theirs_loss.item()) < 1e-6
    assert loss.count == int(objective.count(batch))
    assert ours.keys() == theirs.keys()
    assert ours
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=4e-6, rtol=1e-5, msg=name)  # of up to 4


@pytest.mark.parametrize("name", MODELS)
def test_causal_loss_and_gradient_are_the_models_own(name: str) -> None:
    assert_same_loss_and_gradients(MODELS[name](), CausalLM(), Padding(PAD)(examples()))


@pytest.mark.parametrize("name", MODELS)
def test_causal_loss_is_the_models_own_under_lora(name: str) -> None:
    model = get_peft_model(MODELS[name](), LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    assert_same_loss_and_gradients(model, CausalLM(), Padding(PAD)(examples()))


def test_causal_loss_is_the_models_own_when_the_head_itself_is_adapted() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False))
    assert_same_loss_and_gradients(model, CausalLM(), Padding(PAD)(examples()))


def test_causal_loss_is_the_models_own_under_prompt_tuning() -> None:
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    assert_same_loss_and_gradients(model, CausalLM(), Padding(PAD)(examples()))


def test_causal_loss_is_the_models_own_under_gradient_checkpointing() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)).train()
    model.gradient_checkpointing_enable()
    assert_same_loss_and_gradients(model, CausalLM(), Padding(PAD)(examples()))


def test_causal_loss_under_bf16_autocast_is_close_and_float32() -> None:
    model, batch = tiny_llama(), Padding(PAD)(examples())
    exact = CausalLM()(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = CausalLM()(model, batch)
    assert rounded.total.dtype == torch.float32
    assert rounded.total.item() == pytest.approx(exact.total.item(), rel=1e-2)


def test_the_head_computes_only_labelled_rows() -> None:
    model, batch = tiny_llama(), Padding(PAD)(examples())
    loss = CausalLM()(model, batch)
    assert tuple(loss.outputs.logits.shape) == (1, 0, VOCABULARY)  # and an ordinary one makes no logits
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["lm_head"], r=2))
    assert tuple(CausalLM()(adapted, batch).outputs.logits.shape) == (1, loss.count, VOCABULARY)
    assert tuple(model(input_ids=batch["input_ids"]).logits.shape[:2]) == tuple(
        batch["input_ids"].shape
    )  # hook is gone


def test_a_model_without_a_separate_head_gives_the_same_loss() -> None:
    model, batch = tiny_llama(), Padding(PAD)(examples())
    expected = CausalLM()(model, batch).total
    model.get_output_embeddings = lambda: None
    torch.testing.assert_close(CausalLM()(model, batch).total, expected)


def test_a_batch_without_labels_is_a_clear_error() -> None:
    batch = Padding(PAD)([Encoded((4, 5, 6), (IGNORE,) * 3)])
    with pytest.raises(InvalidInput, match="None of the 8 positions"):
        CausalLM()(tiny_llama(), batch)


def test_masked_loss_and_gradient_are_the_models_own() -> None:
    config = BertConfig(**{**tiny_bert().config.to_dict(), "tie_word_embeddings": True})
    torch.manual_seed(0)
    assert_same_loss_and_gradients(BertForMaskedLM(config).eval(), MaskedLM(), Padding(PAD)(examples()))


def test_sequence_to_sequence_loss_and_gradient_are_the_models_own() -> None:
    pairs = [Encoded((4, 5, 6, 2), (9, 8, 2)), Encoded((7, 2), (5, 6, 7, 8, 2))]
    assert_same_loss_and_gradients(tiny_t5(), SequenceToSequence(), Padding(PAD)(pairs))


def test_classification_loss_and_gradient_are_the_models_own() -> None:
    pairs = [Encoded((4, 5, 6, 2), (2,)), Encoded((7, 2), (0,)), Encoded((9, 9, 2), (1,))]
    model, batch = tiny_bert(), Padding(PAD)(pairs)
    assert_same_loss_and_gradients(model, Classification(), batch)


def test_classification_without_a_label_is_a_clear_error() -> None:
    with pytest.raises(InvalidInput, match="has a label"):
        Classification()(tiny_bert(), Padding(PAD)([Encoded((4, 5), (IGNORE,))]))
