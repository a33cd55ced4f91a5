"""Encoding and batching: stable boundaries, clear refusals, and packing that is loss- and gradient-equivalent."""

import pytest
import torch

from infra.errors import InvalidInput
from tests.tiny_models import PAD, VOCABULARY, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_tokenizer
from training.data.batching import Packing, Padding
from training.data.encoding import (
    Encoded,
    encode,
    encode_classification,
    encode_masked,
    encode_sequence_to_sequence,
)
from training.objectives.causal_lm import CausalLM

IGNORE = -100


def examples(number: int = 6) -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(number):
        length = int(torch.randint(4, 22, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        made.append(Encoded(tuple(ids), (*[IGNORE] * (length // 2), *ids[length // 2 :])))
    return made


def test_only_the_completion_is_labelled() -> None:
    (one,) = encode([("ab", "cd")], tiny_tokenizer(), max_length=8)
    assert len(one.input_ids) == 4
    assert one.labels == (IGNORE, IGNORE, *one.input_ids[2:])


def test_everything_but_the_first_token_is_labelled_on_request() -> None:
    (one,) = encode([("ab", "cd")], tiny_tokenizer(), max_length=8, loss_on="everything")
    assert one.labels == (IGNORE, *one.input_ids[1:])


def test_the_prompts_tokens_do_not_depend_on_the_completion() -> None:
    first, second = encode([("ab ", "cd"), ("ab ", " x")], tiny_tokenizer(), max_length=8)
    assert first.input_ids[:3] == second.input_ids[:3]


def test_a_too_long_example_is_named_with_both_remedies() -> None:
    with pytest.raises(InvalidInput) as error:
        encode([("a", "b"), ("abcdef", "gh")], tiny_tokenizer(), max_length=7)
    assert error.value.what == "Example 2 is 8 tokens long; training.max_length allows 7."
    assert "training.max_length to 8" in error.value.remedy
    assert "too_long: drop" in error.value.remedy


@pytest.mark.parametrize("texts", [("prompt", ""), ("", "")])
def test_an_example_with_nothing_to_learn_is_refused(texts: tuple[str, str]) -> None:
    with pytest.raises(InvalidInput, match="Example 1 has no token to learn"):
        encode([texts], tiny_tokenizer(), max_length=64)


def test_masking_hides_a_share_of_the_tokens_and_labels_just_those() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    text = "x" * 400
    (one,) = encode_masked([text], tokenizer, max_length=512, generator=torch.Generator().manual_seed(0))
    truth = tokenizer(text)["input_ids"]
    labelled = [place for place, label in enumerate(one.labels) if label != IGNORE]
    assert len(labelled) == 60
    assert all(one.labels[place] == truth[place] for place in labelled)
    assert all(token == truth[place] for place, token in enumerate(one.input_ids) if place not in labelled)
    masked = sum(one.input_ids[place] == tokenizer.mask_token_id for place in labelled)
    assert 38 <= masked <= 57  # 48 expected, standard deviation 3.1
    again = encode_masked([text], tokenizer, max_length=512, generator=torch.Generator().manual_seed(0))
    assert again == [one]


def test_sequence_to_sequence_pads_source_and_target_apart() -> None:
    pairs = encode_sequence_to_sequence([("abcdefghi", "x"), ("a", "xyz")], tiny_tokenizer(), max_length=16)
    batch = Padding(PAD)(pairs)
    assert tuple(batch["input_ids"].shape) == (2, 16)
    assert tuple(batch["labels"].shape) == (2, 3)


def test_an_unknown_class_is_refused_by_name() -> None:
    assert encode_classification([("t", "b")], tiny_tokenizer(), classes=["a", "b"], max_length=9)[0].labels == (1,)
    with pytest.raises(InvalidInput, match="'c', which is none of a, b"):
        encode_classification([("t", "c")], tiny_tokenizer(), classes=["a", "b"], max_length=9)


def test_padding_is_on_the_right_and_to_a_multiple_of_eight() -> None:
    batch = Padding(PAD)([Encoded((5, 6, 7), (IGNORE, 6, 7)), Encoded(tuple(range(3, 12)), tuple(range(3, 12)))])
    assert tuple(batch["input_ids"].shape) == (2, 16)
    assert batch["input_ids"][0].tolist() == [5, 6, 7] + [PAD] * 13
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["labels"][0].tolist() == [IGNORE, 6, 7] + [IGNORE] * 13


def test_packing_keeps_every_token_and_uses_fewer_positions() -> None:
    made = examples()
    packed, padded = Packing(PAD, row_length=32)(made), Padding(PAD)(made)
    assert sorted(packed["labels"][packed["labels"] != IGNORE].tolist()) == sorted(
        label for example in made for label in example.labels if label != IGNORE
    )
    assert packed["input_ids"].numel() < padded["input_ids"].numel()
    assert packed["input_ids"].shape[1] <= 32
    assert int((packed["position_ids"] == 0).sum()) >= len(made)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("row_length", [1000, 40, 24], ids=["one row", "several rows", "many rows"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_gemma3])
def test_packing_is_loss_and_gradient_equivalent_to_padding(build, row_length: int, attention: str) -> None:
    made, objective = examples(), CausalLM()
    model = build()
    model.set_attn_implementation(attention)
    model.train()
    results = []
    for collate in (Padding(PAD), Packing(PAD, row_length)):
        model.zero_grad()
        loss = objective(model, collate(made))
        loss.total.backward()
        results.append((loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (padded, padded_gradients), (packed, packed_gradients) = results
    assert padded.count == packed.count
    torch.testing.assert_close(packed.total, padded.total, atol=1e-4, rtol=1e-6)
    for name, gradient in padded_gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=2e-5, rtol=1e-4, msg=name)


def test_packed_examples_do_not_see_each_other() -> None:
    model, made = tiny_llama(), examples(3)
    changed = [made[0], made[1], Encoded(tuple(9 for _ in made[2].input_ids), made[2].labels)]
    collate = Packing(PAD, row_length=1000)
    lengths = sorted(((len(e.input_ids), -i) for i, e in enumerate(made)), reverse=True)
    start = 0
    with torch.no_grad():
        before, after = (
            model(**{k: v for k, v in collate(some).items() if k != "labels"}, use_cache=False).logits
            for some in (made, changed)
        )
    for length, index in lengths:
        same = torch.allclose(before[0, start : start + length], after[0, start : start + length], atol=1e-6)
        assert same == (index != -2)
        start += length
