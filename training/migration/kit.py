"""A migration kit: what is kept of an adapter's private data, so that it can be moved to another base without them.

    kit.json            a few seed examples, the task's name, how many rows there were, how long they were
    discriminator/      an adapter of the source base that tells real inputs from written ones, where there is one

Nothing else of the data is in it. The seeds are rows of the data, word for word unless they were redacted, and a
discriminator, like the adapter itself, was trained on the data and can tell something of them.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp

import torch
from pydantic import ValidationError

from infra.documents import Section, told
from infra.errors import CorruptArtifact, InvalidInput
from infra.files import require_free
from training.adapter_files import attach_stored, write_adapter
from training.base_models import LoadedBase
from training.data.example import Example
from training.migration.choosing import deciles, spread
from training.migration.discriminator import Discriminator, Judged, train_discriminator
from training.migration.options import KitOptions
from training.migration.synthesis import synthesise
from training.progress import OnPreparing, TrainingEvent

KIT_FILE = "kit.json"
DISCRIMINATOR = "discriminator"
FORMAT = 1


class Seed(Section):
    """An example that is kept."""

    prompt: str
    completion: str


class Kit(Section):
    """What `kit.json` says.

    Attributes:
        task: its name, in words.
        instruction: what the adapter's base is told before every prompt.
        rows: training examples that there were.
        longest: characters of the longest input among them.
        lengths: deciles of the inputs' characters; none in a kit of before they were kept.
        longest_answer: characters of the longest completion among them.
        seeds: those that are kept.
        base_reference: the source base.
        base_identity: its content hash.
        discriminator: how well it tells held-out inputs apart; None where there is none.
    """

    format: int = FORMAT
    task: str
    instruction: str
    rows: int
    longest: int
    lengths: tuple[int, ...] = ()
    longest_answer: int
    seeds: tuple[Seed, ...]
    base_reference: str
    base_identity: str
    discriminator: Judged | None = None


def build_kit(
    directory: Path,
    base: LoadedBase,
    examples: Sequence[Example],
    *,
    task: str,
    instruction: str,
    options: KitOptions,
    seed: int,
    workdir: Path,
    on_progress: OnPreparing | None = None,
) -> Kit:
    """Write the kit of an adapter that was trained on `examples`.

    A build that was stopped goes on where it was, as long as `workdir` is there; what lies in it is private, so remove
    it when the kit is done.

    Args:
        directory: new or empty; whole or not there when this returns.
        base: the source base, bare; the discriminator is left on it.
        examples: the private training data.
        task: its name, in words.
        instruction: what the adapter's base was told before every prompt.
        options: what goes in.
        seed: of the choice of seeds and of everything drawn and trained.
        workdir: for what was written and for checkpoints.
        on_progress: told (stage, done, total).

    Raises:
        InvalidInput: no examples, or too few for a discriminator; no such redaction, or one that leaves no seeds.
        RegraftError: the source base writes too few inputs to train a discriminator.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    require_free(directory)
    if not examples:
        raise InvalidInput("A kit needs the examples that the adapter was trained on.", "Are the data still there?")
    redacted = redaction(options.redact)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [examples[place] for place in order]
    chosen = spread(shuffled, options.seeds) if options.choice == "spread" else shuffled[: options.seeds]
    seeds = tuple(Seed(prompt=redacted(each.prompt), completion=redacted(each.completion)) for each in chosen)
    left = {seed.prompt.strip() for seed in seeds}
    if options.redact is not None and ("" in left or len(left) < min(len(seeds), 2)):
        raise InvalidInput(
            f"redact: '{options.redact}' leaves a seed without a prompt, or all with the same.",
            "Seeds show what inputs are like: have it replace names and numbers, not everything.",
        )
    kit = Kit(
        task=task,
        instruction=instruction,
        rows=len(examples),
        longest=max(len(example.prompt) for example in examples),
        lengths=deciles([len(example.prompt) for example in examples]),
        longest_answer=max(len(example.completion) for example in examples),
        seeds=seeds,
        base_reference=base.reference,
        base_identity=base.identity.sha256,
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        if options.filtered:
            judged = _discriminator(staging, base, examples, kit, options, seed, workdir, on_progress)
            kit = kit.model_copy(update={"discriminator": judged})
        content = json.dumps(kit.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
        (staging / KIT_FILE).write_text(content + "\n", encoding="utf-8")
        staging.chmod(0o755)
        staging.replace(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return kit


def read_kit(directory: Path) -> Kit:
    """What a kit says of itself.

    Raises:
        CorruptArtifact: a file is missing or cannot be read.
        InvalidInput: it is of a format that this Regraft does not know.
    """
    path = directory / KIT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
            raise InvalidInput(
                f"{path} is of format {content['format']}; this Regraft reads {FORMAT}.", "Upgrade Regraft."
            )
        kit = Kit.model_validate(content)
    except FileNotFoundError:
        raise CorruptArtifact(f"{directory} holds no {KIT_FILE}.", "Is it a migration kit?") from None
    except (UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
        raise CorruptArtifact(
            f"{path} cannot be read: {told(error)}.", "Build the kit again: regraft kit build"
        ) from None
    if kit.discriminator is not None and not (directory / DISCRIMINATOR).is_dir():
        raise CorruptArtifact(f"{directory} holds no {DISCRIMINATOR}.", "Build the kit again: regraft kit build")
    return kit


def load_discriminator(directory: Path, kit: Kit, base: LoadedBase) -> Discriminator:
    """Put the kit's discriminator on the source base.

    Raises:
        BaseModelMismatch: `base` is another one.
        CorruptArtifact: its files are not what was written.
    """
    adapted = attach_stored(
        base.model, directory / DISCRIMINATOR, base_identity=base.identity.sha256, name=DISCRIMINATOR
    )
    return Discriminator(adapted.model, base.tokenizer, kit.task)


def redaction(hook: str | None) -> Callable[[str], str]:
    """The function that MODULE:FUNCTION names; none given: text as it is.

    Raises:
        InvalidInput: there is no such function.
    """
    if hook is None:
        return str
    module, _, name = hook.partition(":")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # whatever the module does as it is imported
        raise InvalidInput(f"redact: '{hook}' cannot be found ({error}).", "Write MODULE:FUNCTION.") from None
    if not callable(found):
        raise InvalidInput(f"redact: '{hook}' is no function.", "Write MODULE:FUNCTION.")

    def redacted(text: str) -> str:
        try:
            made = found(text)
        except Exception as error:
            what = f"raises {type(error).__name__}"  # no more of it: it may tell the text
        else:
            if isinstance(made, str):
                return made
            what = f"returns {type(made).__name__}"
        raise InvalidInput(
            f"redact: '{hook}' {what} for a seed.",
            "It is called with each seed's prompt and completion, and returns the text that may be kept.",
        )

    return redacted


def _discriminator(
    staging: Path,
    base: LoadedBase,
    examples: Sequence[Example],
    kit: Kit,
    options: KitOptions,
    seed: int,
    workdir: Path,
    on_progress: OnPreparing | None,
) -> Judged:
    tell: OnPreparing = on_progress or (lambda stage, done, total: None)
    real = list(dict.fromkeys(example.prompt for example in examples))
    pool = synthesise(
        base.model,
        base.tokenizer,
        kit.task,
        [each.prompt for each in kit.seeds],
        min(options.inputs, len(real)),
        options.synthesis,
        seed=seed,
        longest=kit.longest,
        kept_in=workdir / "written.jsonl",
        on_progress=lambda done, total, note: tell("inputs that the base writes", done, total),
    )

    def on_event(event: TrainingEvent) -> None:
        tell("training the discriminator", event.step, event.total_steps)

    adapted, judged = train_discriminator(
        base.model,
        base.tokenizer,
        kit.task,
        real,
        pool.inputs,
        options.discriminator,
        seed=seed,
        workdir=workdir / DISCRIMINATOR,
        on_event=on_event,
    )
    write_adapter(
        staging / DISCRIMINATOR,
        adapted.save,
        method_name=options.discriminator.method.name,
        base_identity=kit.base_identity,
        base_reference=kit.base_reference,
        recipe={"discriminator": options.discriminator.model_dump(mode="json", exclude_none=True), "seed": seed},
        metrics={"balanced_accuracy": judged.balanced_accuracy},
    )
    return judged
