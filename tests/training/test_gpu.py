"""What a GPU could change: precision, exact resumption, generation, memory. The contract runs there by TEST_DEVICE."""

import pytest
import torch

from infra.errors import RegraftError
from tests.tiny_models import VOCABULARY, tiny_llama, tiny_tokenizer
from tests.training.methods.backbones import train as train_by_hand
from tests.training.tiny_training import EXAMPLES, HELD_OUT, OPTIONS, fresh, run, same_bits
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.evaluation.evaluate import evaluate
from training.methods.catalog import CATALOG, get_method
from training.options import TrainingOptions
from training.progress import TrainingEvent

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def options(**changed: object) -> TrainingOptions:
    return TrainingOptions.model_validate({**OPTIONS.model_dump(), **changed})


def power_cut_at(step: int):
    def listen(event: TrainingEvent) -> None:
        if event.step == step:
            raise RuntimeError("the power is gone")

    return listen


@pytest.mark.parametrize("method", sorted(CATALOG))
def test_every_method_trains_in_bfloat16_and_goes_on_on_the_cpu(tmp_path, method) -> None:
    config = {"dropout": 0.0} if method == "lora" else {}
    chosen = options(validate_every=10)
    _, expected = run(tmp_path / "cpu", chosen, fresh(method, steps=chosen.steps, **config), HELD_OUT)
    adapted, outcome = run(
        tmp_path / "gpu", chosen, fresh(method, device="cuda", steps=chosen.steps, **config), HELD_OUT
    )
    assert [x for _, x in outcome.losses] == pytest.approx([x for _, x in expected.losses], rel=5e-2)
    assert outcome.validation_losses[-1][1] == pytest.approx(expected.validation_losses[-1][1], rel=5e-2)
    assert outcome.peak_memory_bytes > 0
    adapted.save(tmp_path / "adapter")
    loaded = get_method(method).load(tiny_llama(), tmp_path / "adapter")
    ids = torch.tensor([EXAMPLES[0].input_ids])
    adapted.model.eval()
    with torch.no_grad():
        there, here = adapted.model(input_ids=ids.cuda()).logits.cpu(), loaded.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(here, there, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("method", sorted(CATALOG))
def test_a_killed_training_resumes_to_the_same_bits_on_the_gpu(tmp_path, method) -> None:
    chosen = options(steps=8, checkpoint_every=3)
    whole, _ = run(tmp_path / "whole", chosen, fresh(method, device="cuda", steps=chosen.steps))
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "killed", chosen, fresh(method, device="cuda", steps=chosen.steps), on_event=power_cut_at(5))
    resumed, outcome = run(tmp_path / "killed", chosen, fresh(method, device="cuda", steps=chosen.steps))
    assert outcome.resumed_from == 3
    assert same_bits(resumed.tensors(), whole.tensors())
    assert not same_bits(resumed.tensors(), fresh(method, device="cuda", steps=chosen.steps).tensors())


@pytest.mark.parametrize("change", [{"packing": True, "max_length": 24}, {"gradient_checkpointing": True}])
def test_packing_and_gradient_checkpointing_change_nothing_on_the_gpu(tmp_path, change) -> None:
    plain, _ = run(tmp_path / "plain", options(precision="float32"), fresh(device="cuda", dropout=0.0))
    other, _ = run(tmp_path / "other", options(precision="float32", **change), fresh(device="cuda", dropout=0.0))
    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(other.tensors()[name], tensor, atol=2e-4, rtol=0, msg=name)


@pytest.mark.parametrize("metric", ["exact_match", "multiple_choice", "perplexity"])
def test_the_gpu_judges_as_the_cpu_does(metric) -> None:
    tokenizer = tiny_tokenizer()
    items = [Example(f"{a}+{b}", str(a + b), choices=(str(a + b), "x")) for a in range(5) for b in range(5)]
    here, there = (
        evaluate(
            fresh(device=device).model,
            tokenizer,
            items,
            metric=metric,
            prompt_format=PromptFormat(tokenizer),
            batch_tokens=256,
        )
        for device in ("cpu", "cuda")
    )
    assert there.value == pytest.approx(here.value, rel=1e-4)
    assert there.answers == here.answers


def test_a_bfloat16_base_merges_on_the_gpu() -> None:
    method = get_method("lora")
    adapted = fresh(device="cuda", dropout=0.0)
    train_by_hand(adapted, {"input_ids": torch.tensor([EXAMPLES[0].input_ids], device="cuda")})
    adapted.model.to(torch.bfloat16)
    ids = torch.tensor([EXAMPLES[0].input_ids], device="cuda")
    with torch.no_grad():
        before = adapted.model(input_ids=ids).logits
        merged = adapted.merge()
        after = merged(input_ids=ids).logits
    assert method.card.merge != "no"
    assert after.is_cuda
    assert after.dtype == torch.bfloat16
    assert after.shape[-1] == VOCABULARY
    scale = before.float().abs().max().item()
    assert (after - before).float().abs().max().item() < 0.05 * scale


def test_a_gpu_without_memory_is_told_with_what_to_do(tmp_path) -> None:
    adapted = fresh(device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-3)  # about 80 MB: enough for the model, not for this step
    try:
        with pytest.raises(RegraftError, match=r"(?s)The GPU ran out of memory after step 0: .*batch_size"):
            run(tmp_path, options(batch_size=20_000), adapted, examples=EXAMPLES * 1000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
