"""Distillation of logits against the divergence of the two full distributions, as PyTorch computes it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from infra.errors import InvalidInput
from tests.tiny_models import PAD, VOCABULARY, tiny_llama, tiny_tokenizer
from tests.training.objectives.test_labelled_positions import IGNORE, examples
from training.data.encoding import encode
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.migration.soft_labels import require_shared_vocabulary, soft_labels
from training.objectives.causal_lm import CausalLM
from training.objectives.distillation import Distillation, Softened, SoftPadding, softened

TEMPERATURE = 2.5


def of_teacher(k: int) -> list[Softened]:
    """Random logits, the K largest of them, for every labelled position."""
    generator = torch.Generator().manual_seed(4)
    labels = []
    for example in examples():
        count = sum(label != IGNORE for label in example.labels)
        logits, tokens = torch.randn(count, VOCABULARY, generator=generator).mul(3).topk(k, dim=-1)
        labels.append((tokens, logits))
    return softened(examples(), labels)


def divergence(batch: dict[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """τ²·KL(teacher ‖ student) over everything that is labelled, the teacher's full distribution spelled out."""
    labelled = batch["labels"][:, 1:] != IGNORE
    student = (logits[:, :-1][labelled] / TEMPERATURE).log_softmax(-1)
    full = torch.full_like(student, -torch.inf).scatter(-1, batch["soft_tokens"], batch["soft_logits"])
    teacher = (full / TEMPERATURE).log_softmax(-1)
    return TEMPERATURE**2 * functional.kl_div(student, teacher, reduction="none", log_target=True).nan_to_num(0.0).sum()


@pytest.mark.parametrize("k", [1, 7, VOCABULARY])
def test_the_loss_is_the_divergence_from_the_teachers_distribution(k: int) -> None:
    batch = SoftPadding(PAD)(of_teacher(k))
    assert batch["soft_tokens"].shape == (int(CausalLM().count(batch)), k)
    model = tiny_llama()
    loss = Distillation(TEMPERATURE, weight=1.0)(model, batch)
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(loss.total.detach(), divergence(batch, logits), rtol=1e-5, atol=1e-4)
    assert loss.count == int(Distillation(1.0, 1.0).count(batch))


def test_weights_go_from_the_labels_to_the_teacher() -> None:
    batch, model = SoftPadding(PAD)(of_teacher(5)), tiny_llama()
    hard, soft, both = (Distillation(TEMPERATURE, weight)(model, batch).total.item() for weight in (0.0, 1.0, 0.3))
    assert hard == pytest.approx(CausalLM()(model, SoftPadding(PAD)(examples())).total.item(), rel=1e-6)
    assert both == pytest.approx(0.7 * hard + 0.3 * soft, rel=1e-5)
    assert Distillation(TEMPERATURE, 1.0)(model, SoftPadding(PAD)(examples())).total.item() == pytest.approx(hard)


def test_a_teachers_own_logits_leave_nothing_to_learn() -> None:
    model, form = tiny_llama(), PromptFormat(tiny_tokenizer(), "Say something.")
    asked = [Example("one", "a long answer"), Example("another one", "b"), Example("three", "cc")]
    labels = soft_labels(model, form, asked, VOCABULARY, batch_tokens=64)
    padding = SoftPadding(PAD)
    encoded = encode(map(form.training_text, asked), form.tokenizer, max_length=200)
    loss = Distillation(1.0, 1.0)(model, padding(softened(encoded, labels)))
    assert loss.total.item() == pytest.approx(0, abs=1e-4)
    other = Distillation(1.0, 1.0)(tiny_llama(seed=1), padding(softened(encoded, labels)))
    assert other.total.item() > 1
    with pytest.raises(InvalidInput, match="end their answers differently"):
        softened(encoded[::-1], labels)


def test_soft_labels_are_kept_and_read_again(tmp_path: Path) -> None:
    form = PromptFormat(tiny_tokenizer())
    asked = [Example("one", "a long answer"), Example("another one", "b")]
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {
        "kept_in": tmp_path / "work" / "logits.safetensors",
        "on_progress": lambda *done: told.append(done),
    }
    first = soft_labels(tiny_llama(), form, asked, 3, **options)
    assert told[-1] == (2, 2)
    again = soft_labels(None, form, asked, 3, **options)  # type: ignore[arg-type]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
        assert one[0].shape[1] == 3


def test_other_vocabularies_are_refused() -> None:
    require_shared_vocabulary(tiny_tokenizer(), tiny_tokenizer())
    other = tiny_tokenizer()
    other.add_tokens(["<one more>"])
    with pytest.raises(InvalidInput, match="different vocabularies"):
        require_shared_vocabulary(tiny_tokenizer(), other)
