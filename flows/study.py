"""A blinded reader study in a folder: packets for the readers, what they return, what it says.

FOLDER/packets/reader-1/   form.html and ratings.csv: all that a reader gets
FOLDER/study.json          the blind half; written last, so a folder without it is one that is not finished
FOLDER/key.json            whose answer is whose; read by the analysis alone
FOLDER/answers/            what the versions said, so that an interrupted creation goes on
FOLDER/ratings.json        what was collected
FOLDER/findings.{json,html}
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from prefect import flow
from pydantic import BaseModel, ConfigDict, ValidationError

from flows.gpu import gpu_slot
from flows.progress import Stage
from flows.study_pages import findings_page, form_page
from flows.suites import prepare
from infra.documents import Section, told
from infra.errors import Conflict, CorruptArtifact, InvalidInput, NotFound
from infra.files import require_free, write_whole
from registry import AdapterRegistry
from serving.loading import load, recipe_of
from training.data.example import Example
from training.data.files import read_rows
from training.data.sampling import sample
from training.evaluation.reader_analysis import Findings, analyse
from training.evaluation.reader_ratings import Collected, Ratings, collect, packet_csv
from training.evaluation.reader_study import Design, Key, Study, blind, named, require_intact
from training.evaluation.suite import Suite
from training.evaluation.suite_files import suites_called

File = TypeVar("File", bound=Section)

REFERENCE = "reference"  # the arm of the answers that the data hold
SECRET_BYTES = 32
ITEMS_SEED = 0  # the same items for the same command; what readers see is drawn by the key's secret
ANSWERS_AT_A_TIME = 8  # between two signs of life


class Arms(BaseModel):
    """Whose answers are compared, and to what.

    Attributes:
        versions: addresses, which answer greedily.
        answers: of an arm's name: a file with columns `prompt` and `answer`.
        prompts: a file with a column `prompt`, and `completion` where there are reference answers.
        task: a built-in task instead.
        suite: a suite file instead: the items of all its suites. None of the three: the test data of the first
            version's recipe, or, without versions, the prompts of the first answer file.
        items: at most so many, always the same ones.
        reference: the data's own answers are one more arm.
        max_new_tokens: longest answer of a version.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    versions: tuple[str, ...] = ()
    answers: dict[str, Path] = {}
    prompts: Path | None = None
    task: str | None = None
    suite: str | None = None
    items: int = 30
    reference: bool = False
    max_new_tokens: int = 256


class Created(BaseModel):
    """A study whose packets can go out.

    Attributes:
        arms: in the key's order.
        alike: items to which all arms gave the same answer.
        packets: a folder for each reader.
        already: it was there before, just like this.
    """

    model_config = ConfigDict(frozen=True)

    folder: Path
    arms: tuple[str, ...]
    items: int
    alike: int
    packets: tuple[Path, ...]
    already: bool


def make_study(folder: Path, design: Design, arms: Arms) -> Created:
    """Have the versions answer, draw the packets and write them; again with the same arguments: the same study.

    Raises:
        Conflict: the folder holds another study, or something else.
        CorruptArtifact: its study is not as it was made.
        InvalidInput: too few arms, or answers that are missing.
    """
    registry = AdapterRegistry()
    versions = tuple(registry.get(address).address for address in arms.versions)
    files = {name: _answer_file(path) for name, path in arms.answers.items()}
    names = [*versions, *files, *([REFERENCE] if arms.reference else [])]
    if len(set(names)) < len(names):
        raise InvalidInput(f"Two arms have the same name ({', '.join(names)}).", "Name each arm once.")
    items = _items(arms, versions, files)
    given = {name: _answers_to(items, name, files[name]) for name in files}
    if arms.reference:
        given[REFERENCE] = _references(items)
    asked = named(
        design=design.model_dump(),
        versions=versions,
        given=given,
        items=[example.prompt for example in items],
        max_new_tokens=arms.max_new_tokens,
    )
    if (folder / "study.json").is_file():
        return _found(folder, asked)
    if not ((folder / "answers").is_dir() or (folder / "key.json").is_file()):
        require_free(folder)
    said = {address: _said(folder, address, items, arms.max_new_tokens) for address in versions}
    answers = {name: said.get(name) or given[name] for name in names}
    secret = (
        _read(folder / "key.json", Key).secret if (folder / "key.json").is_file() else secrets.token_hex(SECRET_BYTES)
    )
    study, key = blind(design, [example.prompt for example in items], answers, secret, asked)
    write_whole(folder / "key.json", key.as_file())
    for reader in range(design.readers):
        _write_packet(folder, study, reader)
    write_whole(folder / "study.json", study.model_dump_json(indent=1) + "\n")
    return _created(folder, study, key, already=False)


@flow(name="create-study", flow_run_name="study in {folder}")
def create_study(folder: Path, design: Design, arms: Arms) -> Created:
    """As `make_study`, in Prefect's sight: for arms that are versions."""
    return make_study(folder, design, arms)


def collect_study(folder: Path, files: Sequence[Path], partial: bool = False) -> tuple[Study, Ratings]:
    """Read what came back; all of it or nothing is kept, instead of what was collected before."""
    study = _read(folder / "study.json", Study)
    ratings = collect(study, files, partial)
    write_whole(folder / "ratings.json", Collected.of(ratings).model_dump_json(indent=1) + "\n")
    return study, ratings


def analyse_study(folder: Path) -> Findings:
    """Unblind, compare, and write the findings as JSON and as a page."""
    study, key = _read(folder / "study.json", Study), _read(folder / "key.json", Key)
    if not (folder / "ratings.json").is_file():
        raise NotFound("Nothing was collected yet.", f"First: regraft study collect {folder} FILE…")
    collected = _read(folder / "ratings.json", Collected, "Collect again what the readers returned.")
    findings = analyse(study, key, collected.ratings)
    write_whole(folder / "findings.json", findings.model_dump_json(indent=1) + "\n")
    write_whole(folder / "findings.html", findings_page(study.design, findings))
    return findings


def _items(arms: Arms, versions: Sequence[str], files: Mapping[str, Mapping[str, str]]) -> tuple[Example, ...]:
    if sum(each is not None for each in (arms.prompts, arms.task, arms.suite)) > 1:
        raise InvalidInput("A study has one source of items.", "Give a file of prompts, or a task, or a suite.")
    version = AdapterRegistry().get(versions[0]) if versions else None
    recipe = recipe_of(version) if version else None
    if arms.prompts:
        rows = [(place, _text(place, row, "prompt"), row) for place, row in read_rows(arms.prompts)]
        among = [Example(prompt, str(row.get("completion") or ""), place=place) for place, prompt, row in rows]
    elif arms.suite:
        among = [example for suite in suites_called(arms.suite) for example in prepare(suite, recipe).examples]
    elif versions or arms.task:
        suite = Suite(task=arms.task, samples=arms.items, seed=ITEMS_SEED, metric="exact_match")
        return prepare(suite, recipe).examples
    else:
        among = [Example(prompt, "") for prompt in next(iter(files.values()), {})]
    distinct = {example.prompt: example for example in among}
    return tuple(sample(list(distinct.values()), arms.items, ITEMS_SEED))


def _answer_file(path: Path) -> dict[str, str]:
    """Answers by prompt."""
    answers: dict[str, str] = {}
    for place, row in read_rows(path):
        prompt, answer = _text(place, row, "prompt"), _text(place, row, "answer")
        if answers.setdefault(prompt, answer) != answer:
            raise InvalidInput(f"{place}: another answer to a prompt that was there already.", "Keep one of them.")
    return answers


def _text(place: str, row: Mapping[str, object], column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str) or (column == "prompt" and not text.strip()):
        raise InvalidInput(f"{place} has no text in column '{column}'.", "Write it as a string.")
    return text


def _answers_to(items: Sequence[Example], arm: str, answers: Mapping[str, str]) -> list[str]:
    lacking = [example for example in items if example.prompt not in answers]
    if lacking:
        raise InvalidInput(
            f"{arm} has no answer to {len(lacking)} of {len(items)} items, the first: {lacking[0].prompt[:80]!r}.",
            "Give a row with that prompt, character by character.",
        )
    return [answers[example.prompt] for example in items]


def _references(items: Sequence[Example]) -> list[str]:
    if lacking := [example for example in items if not example.completion.strip()]:
        raise InvalidInput(
            f"{lacking[0].place or repr(lacking[0].prompt[:80])} has no reference answer.",
            "Write a column 'completion', or leave out --reference.",
        )
    return [example.completion for example in items]


def _said(folder: Path, address: str, items: Sequence[Example], max_new_tokens: int) -> list[str]:
    """A version's answers: as they were said before, else now."""
    prompts = [example.prompt for example in items]
    kept = folder / "answers" / f"{named(address=address, prompts=prompts, max_new_tokens=max_new_tokens)[:16]}.json"
    if kept.is_file():
        return list(json.loads(kept.read_text(encoding="utf-8")))
    adapter, stage = load(address), Stage(f"{address}: {len(items)} answers")
    answers: list[str] = []
    with gpu_slot(next(adapter.model.parameters()).device):
        for start in range(0, len(prompts), ANSWERS_AT_A_TIME):
            answers += adapter.generate(prompts[start : start + ANSWERS_AT_A_TIME], max_new_tokens)
            stage(len(answers), len(prompts))
    write_whole(kept, json.dumps(answers))
    return answers


def _write_packet(folder: Path, study: Study, reader: int) -> None:
    packet = folder / "packets" / f"reader-{reader + 1}"
    packet.mkdir(parents=True, exist_ok=True)
    (packet / "ratings.csv").write_text(packet_csv(study, reader), encoding="utf-8", newline="")
    write_whole(packet / "form.html", form_page(study, reader))


def _found(folder: Path, asked: str) -> Created:
    """The study that is there, if it is the one asked for and still what it was; packets that were lost come back."""
    study, key = _read(folder / "study.json", Study), _read(folder / "key.json", Key)
    if study.asked != asked:
        raise Conflict(
            f"{folder} holds a study of other items, answers or criteria; its packets may be with the readers.",
            "Name a new folder.",
        )
    require_intact(study, key)
    for reader in range(study.design.readers):
        table = folder / "packets" / f"reader-{reader + 1}" / "ratings.csv"
        if not (table.is_file() and table.with_name("form.html").is_file()):
            _write_packet(folder, study, reader)
        elif table.read_bytes() != packet_csv(study, reader).encode():
            raise CorruptArtifact(f"{table} is not as it was made.", "Remove it, and create again: it comes back.")
    return _created(folder, study, key, already=True)


def _created(folder: Path, study: Study, key: Key, already: bool) -> Created:
    texts: dict[int, set[str]] = {}
    for shown in study.packets[0]:
        texts.setdefault(shown.item, set()).add(shown.text)
    return Created(
        folder=folder,
        arms=key.arms,
        items=key.items,
        alike=sum(len(each) == 1 for each in texts.values()),
        packets=tuple(folder / "packets" / f"reader-{reader + 1}" for reader in range(study.design.readers)),
        already=already,
    )


def _read(path: Path, kind: type[File], remedy: str = "Bring it back from a copy.") -> File:
    if not path.is_file():
        raise NotFound(f"{path} is not there.", "Create the study first: regraft study create")
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise CorruptArtifact(f"{path} is damaged: {told(error)}.", remedy) from None
