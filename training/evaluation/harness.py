"""Tasks of EleutherAI's `lm-eval` on one of our models. Needs the extra `regraft[harness]`."""

import hashlib
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from infra.documents import did_you_mean
from infra.errors import InvalidInput, NotFound
from training.evaluation.prompt_cache import judging
from training.evaluation.result import EvaluationResult, accuracy


def run_harness(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: Path | None = None,
    batch_size: int = 8,
) -> dict[str, EvaluationResult]:
    """Run tasks of lm-eval, with its prompts, its metrics and its few-shot examples.

    Args:
        model: a causal language model, bare or adapted.
        tokenizer: of the base model.
        tasks: names of tasks or groups of lm-eval, e.g. `arc_easy`.
        limit: only the first so many items of each task.
        include_path: folder with task definitions (YAML) beside those that lm-eval brings.
        batch_size: rows of a batch.

    Returns:
        one result a task and metric, by `lm-eval/TASK/METRIC`. A metric that is 0 or 1 for each item has outcomes and
        a Wilson interval; others have ± 1.96 standard errors as lm-eval estimates them, or no interval.

    Raises:
        NotFound: lm-eval is not installed, no such task, or a task whose data cannot be fetched.
        InvalidInput: no tasks.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise NotFound("The EleutherAI harness (lm-eval) is not installed.", "pip install 'regraft[harness]'")
    if not tasks:
        raise InvalidInput("No harness task is named.", "Example: arc_easy")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=str(include_path) if include_path else None, include_defaults=include_path is None
    )
    if include_path is not None and not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(include_path))  # lm-eval's own 14,000 tasks, too: takes a while
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise NotFound(
            f"lm-eval has no task '{unknown[0]}'. {_closest(unknown[0], manager.all_tasks)}", "See: lm-eval ls tasks"
        )
    started = time.monotonic()
    try:
        with judging(model):
            report: Any = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                limit=limit,
                task_manager=manager,
                bootstrap_iters=1000,
                random_seed=None,  # these three would seed the generators of the whole process
                numpy_random_seed=None,
                torch_random_seed=None,
                fewshot_random_seed=0,
            )
    except (ConnectionError, FileNotFoundError) as error:
        raise NotFound(
            f"The data of {', '.join(tasks)} cannot be fetched ({type(error).__name__}).",
            "lm-eval takes them from the Hugging Face hub: run where there is a network, or with a filled cache.",
        ) from error
    seconds = time.monotonic() - started
    return {
        f"lm-eval/{task}/{metric}": result
        for task, samples in report["samples"].items()
        for metric, result in _results(report["results"][task], samples, seconds).items()
    }


def _results(found: dict[str, Any], samples: list[dict[str, Any]], seconds: float) -> dict[str, EvaluationResult]:
    """One result for each `METRIC,FILTER` entry of a task; the filter `none` is not named."""
    results = {}
    for key, value in found.items():
        metric, _, chosen_filter = key.partition(",")
        if not chosen_filter or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        items = [item for item in samples if item["filter"] == chosen_filter]
        items.sort(key=lambda item: item["doc_id"])
        fingerprint = hashlib.sha256("\n".join(item["doc_hash"] for item in items).encode()).hexdigest()
        name = metric if chosen_filter == "none" else f"{metric},{chosen_filter}"
        outcomes = [item.get(metric) for item in items]
        if all(outcome in (0, 1) for outcome in outcomes):
            results[name] = accuracy(
                name,
                [int(outcome) for outcome in outcomes],  # type: ignore[arg-type]
                [],
                seconds=seconds,
                dataset_fingerprint=fingerprint,
            )
            continue
        error = found.get(f"{metric}_stderr,{chosen_filter}")
        stderr = float(error) if isinstance(error, int | float) else None
        results[name] = EvaluationResult(
            metric=name,
            value=float(value),
            low=None if stderr is None else value - 1.96 * stderr,
            high=None if stderr is None else value + 1.96 * stderr,
            stderr=stderr,
            samples=len(items),
            seconds=seconds,
            dataset_fingerprint=fingerprint,
        )
    return results


def _closest(task: str, known: Sequence[str]) -> str:
    hint = did_you_mean(task, list(known))
    return hint if hint.startswith("Did") else ""  # there are thousands
