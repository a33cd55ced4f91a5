"""CPT: it starts as in-context learning, stays within its ball, and adds the demonstrations' own loss."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from infra.errors import InvalidInput
from tests.tiny_models import tiny_bert, tiny_llama, tiny_tokenizer
from tests.training.methods.backbones import BACKBONES, logits, train
from tests.training.tiny_training import OPTIONS, run, same_bits
from training.methods.contract import AttachContext
from training.methods.cpt import METHOD, CptAdapted
from training.options import TrainingOptions

BATCH = {"input_ids": BACKBONES["llama"].batch()["input_ids"]}
SHOWN = [{"input": "2+3", "output": "5"}, {"input": "4+4", "output": "8"}]
TEXT = "input: 2+3 output: 5\ninput: 4+4 output: 8\n"
TYPES = [kind for e in (0, 4) for kind in [1 + e] * 7 + [2 + e] * 3 + [3 + e] * 9 + [4 + e, 0]]


def attached(model=None, calibration=None, **options: object) -> CptAdapted:
    config = METHOD.config_type(**{"virtual_tokens": len(TEXT), "demonstrations": SHOWN, **options})
    context = AttachContext(processor=tiny_tokenizer(), calibration=calibration)
    return METHOD.attach(tiny_llama() if model is None else model, config, context)


def test_a_fresh_adapter_is_in_context_learning() -> None:
    adapted, ids = attached(), tiny_tokenizer()(TEXT)["input_ids"]
    assert adapted.peft_config.cpt_token_ids == ids
    assert adapted.peft_config.cpt_tokens_type_mask == TYPES
    rows = torch.cat([torch.tensor(ids).expand(2, -1), BATCH["input_ids"]], dim=1)
    expected = logits(tiny_llama(), {"input_ids": rows})[:, len(ids) :]
    assert_close(logits(adapted.model, BATCH), expected, atol=1e-6, rtol=1e-6)
    assert list(adapted.trainable()) == ["prompt_encoder.default.delta_embedding.weight"]


def test_the_last_tokens_are_taken_and_their_types_begin_anew() -> None:
    config = attached(virtual_tokens=15).peft_config
    assert config.cpt_token_ids == tiny_tokenizer()(TEXT)["input_ids"][-15:]
    assert config.cpt_tokens_type_mask == [t and t - 4 for t in TYPES[-15:]]
    with pytest.raises(InvalidInput, match="have 42 tokens, and virtual_tokens is 50"):
        attached(virtual_tokens=50)


def test_no_row_leaves_its_ball_and_labels_do_not_move() -> None:
    adapted = attached(epsilon=0.3, format_epsilon=0.1)
    train(adapted, BATCH, steps=4, rate=5.0)
    before = logits(adapted.model, BATCH)
    assert torch.equal(logits(adapted.model, BATCH), before)  # projecting what is projected changes nothing
    norms = adapted.encoder.delta_embedding.weight.norm(dim=1)
    width = (32 / 2048) ** 0.5
    kinds = torch.tensor(TYPES) % 4
    assert_close(norms[kinds == 2], torch.full((6,), 0.3 * width), rtol=1e-5, atol=0)
    assert_close(norms[kinds % 2 == 1], torch.full((32,), 0.1 * width), rtol=1e-5, atol=0)
    assert (norms[kinds == 0] == 0).all()


def test_the_extra_loss_is_the_decayed_mean_over_the_demonstrations_labels() -> None:
    adapted = attached(decay=0.5, context_weight=3.0)
    ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    shown = logits(tiny_llama(), {"input_ids": ids[None]})[0]
    places = [place for place, kind in enumerate(TYPES) if kind and kind % 4 == 0]
    first, second = (cross_entropy(shown[place - 1], ids[place]) for place in places)
    assert_close(adapted.extra_loss(None, {}), 3.0 * (0.25 * first + 0.5 * second) / 2, atol=1e-5, rtol=1e-5)
    assert attached(context_weight=0.0).extra_loss(None, {}) is None


def test_the_models_own_loss_is_the_bases_under_any_name() -> None:
    config = METHOD.config_type(virtual_tokens=len(TEXT), demonstrations=SHOWN)
    adapted = METHOD.attach(tiny_llama(), config, AttachContext(processor=tiny_tokenizer()), "anna")
    labels = BATCH["input_ids"].clone()
    shown = logits(adapted.model, BATCH)
    expected = cross_entropy(shown[:, :-1].reshape(-1, shown.shape[-1]), labels[:, 1:].reshape(-1))
    assert_close(adapted.model(**BATCH, labels=labels).loss, expected)
    assert adapted.model(**BATCH).loss is None


def test_training_examples_are_the_demonstrations_where_none_are_given() -> None:
    ids = torch.tensor([[0, 5, 6, 7, 8], [9, 10, 11, 12, 13]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, 7, 8], [-100, -100, -100, -100, 13]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    adapted = attached(calibration=lambda: [batch], demonstrations=(), virtual_tokens=8)
    assert adapted.peft_config.cpt_token_ids == [6, 7, 8, 9, 10, 11, 12, 13]
    assert adapted.peft_config.cpt_tokens_type_mask == [2, 4, 4, 6, 6, 6, 6, 8]
    with pytest.raises(InvalidInput, match="Every token of the demonstrations is a label"):
        attached(calibration=lambda: [batch | {"labels": ids}], demonstrations=(), virtual_tokens=8)
    with pytest.raises(InvalidInput, match="needs calibration data or demonstrations"):
        attached(demonstrations=())


def test_what_it_cannot_prompt_is_refused() -> None:
    with pytest.raises(InvalidInput, match="causal language model"):
        attached(tiny_bert())
    with pytest.raises(InvalidInput, match="leaves no room in the 256 positions"):
        attached(virtual_tokens=300)
    with pytest.raises(InvalidInput, match="tokenizer"):
        METHOD.attach(tiny_llama(), METHOD.config_type(demonstrations=SHOWN), AttachContext())


def test_a_training_resumes_to_the_same_bits(tmp_path) -> None:
    chosen = TrainingOptions.model_validate({**OPTIONS.model_dump(), "steps": 8, "checkpoint_every": 3})

    def cut(event) -> None:
        if event.step == 5:
            raise RuntimeError("the power is gone")

    whole, _ = run(tmp_path / "whole", chosen, attached(epsilon=0.5))
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "cut", chosen, attached(epsilon=0.5), on_event=cut)
    resumed, outcome = run(tmp_path / "cut", chosen, attached(epsilon=0.5))
    assert outcome.resumed_from == 3
    assert same_bits(resumed.tensors(), whole.tensors())
