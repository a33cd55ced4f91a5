"""Greedy answers: the oracle is transformers' own generate, one prompt at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM

from infra.errors import InvalidInput
from tests.tiny_models import VOCABULARY, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer
from training.evaluation.generation import greedy_answers
from training.evaluation.prompt_cache import PromptCache, in_batches, judging

NEW = 12


def adapted(base: nn.Module, config: Any) -> nn.Module:
    """A PEFT model whose adapter does something: fresh ones may start at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = get_peft_model(base, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tiny_mamba() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
        return MambaForCausalLM(config).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "gemma3": tiny_gemma3,
    "mamba": tiny_mamba,
    "llama+lora": lambda: adapted(
        tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    ),
    "llama+prompt": lambda: adapted(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "gpt2+prompt": lambda: adapted(tiny_gpt2(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "llama+prefix": lambda: adapted(tiny_llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "gpt2+prefix": lambda: adapted(tiny_gpt2(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "gemma3+prompt": lambda: adapted(tiny_gemma3(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
}


def prompts(shared: int, seed: int = 0) -> list[list[int]]:
    """Nine prompts that share a beginning and go on for 1 to 30 tokens; two of them are equal."""
    generator = torch.Generator().manual_seed(seed)

    def draw(number: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (number,), generator=generator).tolist()

    beginning = draw(shared)
    rests = [draw(length) for length in (7, 1, 30, 12, 12, 3, 21, 8)]
    return [beginning + rest for rest in [*rests, rests[3]]]


def one_by_one(model: Any, prompt: list[int], ends: set[int]) -> str:
    ids = torch.tensor([prompt])
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=sorted(ends), pad_token_id=0)
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    tokens = output[0, len(prompt) :].tolist()
    kept = tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]
    return tiny_tokenizer().decode(kept, skip_special_tokens=True).strip()


@pytest.mark.parametrize("shared", [0, 1, 17, 45])
@pytest.mark.parametrize("name", MODELS)
def test_batched_answers_are_those_of_one_by_one_generation(name: str, shared: int) -> None:
    model, ends = MODELS[name](), set(range(2, VOCABULARY, 9))  # every ninth token ends: rows finish at other times
    wanted = [one_by_one(model, prompt, ends) for prompt in prompts(shared)]
    answers = greedy_answers(model, tiny_tokenizer(), prompts(shared), max_new_tokens=NEW, ends=ends, batch_tokens=200)
    assert answers == wanted
    assert len(set(wanted)) > 1  # the oracle can tell rows apart


def test_rows_that_finish_at_different_steps_leave_the_others_alone() -> None:
    model = tiny_llama()
    alone = [one_by_one(model, prompt, set()) for prompt in prompts(10)]
    assert greedy_answers(model, tiny_tokenizer(), prompts(10), max_new_tokens=NEW, ends=()) == alone


@pytest.mark.parametrize(
    ("name", "shared", "reused"),
    [
        ("llama", 17, 17),
        ("llama", 0, 0),
        ("llama+lora", 17, 17),
        ("llama+prompt", 17, 17),
        ("gpt2+prefix", 17, 17),
        ("gemma3", 17, 17),  # 17 + 30 + 12 tokens fit into the window of 64
        ("gemma3", 45, 0),  # 45 + 30 + 12 do not
    ],
)
def test_what_all_prompts_begin_with_is_read_once(name: str, shared: int, reused: int) -> None:
    model = MODELS[name]()
    with judging(model):
        cache = PromptCache(model, prompts(shared), NEW)
    assert cache.usable
    assert cache.shared == reused


@pytest.mark.parametrize(("name", "shared"), [("mamba", 17), ("llama+prompt", 0), ("gemma3+prompt", 45)])
def test_models_that_cannot_share_a_prefix_safely_go_without(name: str, shared: int) -> None:
    model = MODELS[name]()
    with judging(model):
        assert not PromptCache(model, prompts(shared), NEW).usable


def test_equal_prompts_keep_a_token_of_their_own() -> None:
    with judging(model := tiny_llama()):
        assert PromptCache(model, [[5, 6, 7], [5, 6, 7]], NEW).shared == 2


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    (whole,) = greedy_answers(model, tokenizer, [[40, 50, 60]], max_new_tokens=NEW, ends=())
    stop = whole[4:6]
    (cut,) = greedy_answers(model, tokenizer, [[40, 50, 60]], max_new_tokens=NEW, ends=(), stop_strings=[stop])
    assert cut == whole.partition(stop)[0].strip()
    assert len(cut) < len(whole)


def test_progress_counts_every_answer() -> None:
    told: list[tuple[int, int]] = []
    greedy_answers(
        tiny_llama(),
        tiny_tokenizer(),
        prompts(4),
        max_new_tokens=2,
        ends=(),
        batch_tokens=60,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (9, 9)
    assert len(told) > 2
    assert told == sorted(told)


def test_a_prompt_too_long_for_the_model_is_refused_with_numbers() -> None:
    with pytest.raises(InvalidInput, match=r"needs 312 tokens.*at most 256") as error:
        greedy_answers(tiny_llama(), tiny_tokenizer(), [[5] * 300], max_new_tokens=NEW, ends=())
    assert "max_new_tokens" in error.value.remedy


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidInput, match="empty once tokenised"):
        greedy_answers(tiny_llama(), tiny_tokenizer(), [[5], []], max_new_tokens=NEW, ends=())


def test_no_prompts_give_no_answers() -> None:
    assert greedy_answers(tiny_llama(), tiny_tokenizer(), [], max_new_tokens=NEW, ends=()) == []


def test_judging_restores_the_mode_of_every_module() -> None:
    model = tiny_llama().train()
    model.lm_head.eval()
    with judging(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert not model.lm_head.training
    assert all(module.training for module in model.modules() if module is not model.lm_head)


def test_batches_are_length_sorted_and_within_budget() -> None:
    lengths = [3, 10, 1, 7, 7, 2, 40]
    batches = list(in_batches(lengths, 20))
    assert sorted(place for batch in batches for place in batch) == list(range(7))
    assert [lengths[place] for batch in batches for place in batch] == sorted(lengths, reverse=True)
    assert all(len(batch) == 1 or len(batch) * lengths[batch[0]] <= 20 for batch in batches)


def test_an_encoder_decoder_has_no_prompt_cache() -> None:
    with judging(model := tiny_t5()):
        assert not PromptCache(model, [[5, 6]], NEW).usable
