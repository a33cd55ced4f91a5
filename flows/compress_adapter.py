"""Regraft: the smallest form of a version that is as good, less a little: walked, measured, registered as its child."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from flows.attached import attached, base_of
from flows.derived import (
    Asked,
    Measured,
    better,
    drawn,
    measured,
    register_derived,
    registered,
    stored_adapter,
    suites_of,
)
from flows.evaluate_adapter import run_suite
from flows.pictures import as_png, axes_of_a_picture
from flows.progress import Stage
from flows.promote_adapter import Promotion, promote_adapter
from flows.reports import report_picture, report_table
from flows.run_states import cancel_if_interrupted
from flows.suites import Prepared
from infra.errors import InvalidInput
from infra.files import write_whole
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.addresses import adapter_name, alias_name
from registry.attachments import MIGRATION_KIT
from registry.records import Parent, VersionRecord
from training.compression.adapter import Compressed, check, compressed, dense_bytes, is_plain_lora
from training.compression.steps import Steps, read_steps
from training.compression.stored import write_compressed
from training.data.example import fingerprint
from training.evaluation.suite import Suite
from training.merging.adapter import Adapter
from training.methods.contract import TENSORS_FILE
from training.migration.gate import Standing
from training.shared_bases import shared_bases

COMPRESSED = "compressed_from"
WALK = (
    "groups:bits=8",
    "groups:bits=4",
    "codebook:bits=4",
    "codebook:bits=2",
    "codebook:bits=1",
    "compeft:density=0.5",
    "compeft:density=0.3",
    "compeft:density=0.2",
    "compeft:density=0.1",
    "compeft:density=0.05",
)
WALK_OF_LORAS = (  # an energy of nearly 1 only makes A and B equally large, or all that is kept would be A's
    "low_rank:energy=0.95+groups:bits=4",
    "low_rank:energy=0.8+groups:bits=4",
    "low_rank:energy=0.9+groups:bits=4,levels=5",
    "low_rank:energy=0.8+groups:bits=4,levels=5",
    "low_rank:energy=0.9+groups:bits=2",
    "low_rank:energy=0.9999+compeft:density=0.2",
)
ALPHA_ITEMS = 64  # of each suite, by which α is chosen: likelihoods tell more apart than right and wrong
ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)  # the paper's


class Form(BaseModel):
    """One way to store the adapter.

    Attributes:
        steps: how it is compressed.
        size_bytes: of the file of its tensors.
        ratio: how many times smaller than all its numbers in bfloat16.
        values: what it measures on each suite's validation items.
        passed: whether these are within the allowed loss.
        on_front: nothing that is no larger is better.
    """

    model_config = ConfigDict(frozen=True)

    steps: str
    size_bytes: int
    ratio: float
    values: list[float]
    passed: bool
    on_front: bool


class Compression(BaseModel):
    """What a compression made; no address where no form within the allowed loss is smaller than the version is.

    Sizes are those of the files of tensors. `passed` says whether the form that was chosen by validation items is
    within the allowed loss on the suites themselves, too.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    address: str | None
    steps: str | None
    dense_bytes: int
    source_bytes: int
    size_bytes: int | None
    before: list[float]
    suites: list[str]
    forms: list[Form]
    measured: list[Measured]
    passed: bool | None
    promotion: Promotion | None
    seconds: float


@dataclass(frozen=True)
class CompressionPlan:
    """What is known before a model is loaded."""

    source: VersionRecord
    name: str
    walk: tuple[Steps, ...]
    asked: tuple[Asked, ...]
    allowed_loss: float


@flow(name="compress-adapter", flow_run_name="compress {address}", on_failure=[cancel_if_interrupted])
def compress_adapter(
    address: str,
    walk: tuple[str, ...] = (),
    allowed_loss: float = 0.01,
    suites: tuple[Suite, ...] = (),
    samples: int = 200,
    name: str | None = None,
    promote_to: str | None = None,
) -> Compression:
    """Find the smallest form of a version within the allowed loss, register it, and measure it beside the version.

    None is registered that is no smaller than the version is. Forms are judged on the suites' validation split, so that
    their test split has chosen nothing.

    Args:
        address: the version to compress.
        walk: the forms to try, as `training.compression.steps.read_steps` reads them; of a `compeft` that names no
            `alpha` the one is taken, of the paper's, at which the validation answers are most probable. None given:
            `WALK`, and of a LoRA `WALK_OF_LORAS`.
        allowed_loss: accuracy that may be lost; of perplexity, the share that it may grow by.
        suites: to measure on. None given: those of the version's recipe.
        samples: validation items of each suite, at most.
        name: of the adapter that the result belongs to. Default: the version's own.
        promote_to: an alias, moved if the result passes and its policy allows it.

    Raises:
        InvalidInput: an unknown step, or one that does not go with the adapter; nothing to measure on.
    """
    began = time.monotonic()
    plan = plan_compression(address, walk, allowed_loss, suites, name, promote_to)
    source = plan.source
    with shared_bases():
        with base_of(source) as base:
            adapter = stored_adapter(source, base)
        validation = drawn(plan.asked, split="validation", samples=samples, name=None)
        before, forms = _walk(plan, adapter, validation)
        version, found, source_bytes = None, [], _size(source)
        smaller = (form for form in forms if form.passed and form.size_bytes < source_bytes)
        chosen = min(smaller, key=lambda form: form.size_bytes, default=None)
        if chosen is not None:
            version = _register(plan, adapter, chosen, forms)
            with registered(version):
                found = measured(version, [source], drawn(plan.asked))
    passed = None
    if found:
        passed = all(_within(m.metric, m.parents[0].value, m.child.value, plan.allowed_loss) for m in found)
    promotion = promote_adapter(version.address, alias=promote_to) if version and passed and promote_to else None
    _report(source, validation, before, forms)
    return Compression(
        source=source.address,
        address=version.address if version else None,
        steps=chosen.steps if chosen else None,
        dense_bytes=dense_bytes(adapter.tensors),
        source_bytes=source_bytes,
        size_bytes=chosen.size_bytes if chosen else None,
        before=before,
        suites=[suite.title for suite in validation],
        forms=forms,
        measured=found,
        passed=passed,
        promotion=promotion,
        seconds=time.monotonic() - began,
    )


def plan_compression(
    address: str,
    walk: Sequence[str],
    allowed_loss: float,
    suites: Sequence[Suite],
    name: str | None,
    promote_to: str | None,
) -> CompressionPlan:
    """All that can be refused before a model is loaded. See `compress_adapter`."""
    source = AdapterRegistry().get(address)
    if promote_to is not None:
        alias_name(promote_to)
    asked = suites_of([source], suites)
    if not asked:
        raise InvalidInput(
            f"{source.address} has no suite by which to judge what compression costs.", "Name a task: --task NAME"
        )
    steps = tuple(map(read_steps, dict.fromkeys(walk)))
    return CompressionPlan(source, adapter_name(name or source.adapter), steps, asked, allowed_loss)


def _size(version: VersionRecord) -> int:
    return (AdapterRegistry().materialise(version.address) / TENSORS_FILE).stat().st_size


def _walk(plan: CompressionPlan, adapter: Adapter, suites: Sequence[Prepared]) -> tuple[list[float], list[Form]]:
    """What the version measures, and every form with what it measures, smallest first."""
    dense, source = dense_bytes(adapter.tensors), plan.source
    walk = plan.walk or tuple(map(read_steps, WALK + (WALK_OF_LORAS if is_plain_lora(adapter) else ())))
    for steps in walk:
        check(adapter, steps)
    stage = Stage(f"compress {source.address}: forms")
    stage(0, len(walk))
    get_settings().runs.mkdir(parents=True, exist_ok=True)
    values = _Values(source)
    before = values.of(None, suites)
    found: list[tuple[Steps, int, list[float]]] = []
    for done, steps in enumerate(walk):
        chosen, form = _best(values, adapter, steps, suites)
        found.append((chosen, len(form.data), values.of((form, chosen), suites)))
        stage(done + 1, len(walk), chosen.line)
    values.done()
    forms = [
        Form(
            steps=steps.line,
            size_bytes=size,
            ratio=dense / size,
            values=own,
            passed=all(
                _within(suite.metric, old, new, plan.allowed_loss)
                for suite, old, new in zip(suites, before, own, strict=True)
            ),
            on_front=not any(
                other_size <= size and _score(suites, other) > _score(suites, own) for _, other_size, other in found
            ),
        )
        for steps, size, own in found
    ]
    return before, sorted(forms, key=lambda form: form.size_bytes)


def _score(suites: Sequence[Prepared], values: Sequence[float]) -> float:
    return fmean(better(suite.metric, value) for suite, value in zip(suites, values, strict=True))


def _best(values: "_Values", adapter: Adapter, steps: Steps, suites: Sequence[Prepared]) -> tuple[Steps, Compressed]:
    """The form; where α is left open, the one of the paper's by which the right answers are most probable."""
    with base_of(values.source) as base:
        own = dict(base.model.state_dict())
    if not steps.open_alpha:
        return steps, compressed(adapter, steps, own)
    likelihoods = [
        replace(suite, metric="perplexity", also=(), shots=(), examples=suite.examples[:ALPHA_ITEMS])
        for suite in suites
    ]
    tried = [(with_alpha, compressed(adapter, with_alpha, own)) for with_alpha in map(steps.with_alpha, ALPHAS)]
    costs = [sum(map(log, values.of((form, line), likelihoods))) for line, form in tried]
    return tried[costs.index(min(costs))]


class _Values:
    """What forms of a version measure; kept in a file, so that a walk that was stopped goes on."""

    def __init__(self, source: VersionRecord) -> None:
        self.source = source
        self._path = get_settings().runs / f"compress-{source.artifact_sha256[:16]}.json"
        self._known: dict[str, list[float]] = json.loads(self._path.read_text()) if self._path.is_file() else {}

    def of(self, form: tuple[Compressed, Steps] | None, suites: Sequence[Prepared]) -> list[float]:
        """Of a form, or of the version itself where there is none, loaded as it would be from the registry."""
        title = form[1].line if form else self.source.address
        key = " ".join([title, *(f"{suite.metric}:{fingerprint(suite.examples)}" for suite in suites)])
        if key not in self._known:
            self._known[key] = self._measured(form, suites, title)
            write_whole(self._path, json.dumps(self._known))
        return self._known[key]

    def done(self) -> None:
        """The walk has come to its end."""
        self._path.unlink(missing_ok=True)

    def _measured(self, form: tuple[Compressed, Steps] | None, suites: Sequence[Prepared], title: str) -> list[float]:
        with TemporaryDirectory(dir=self._path.parent, prefix="form-") as scratch:
            if form is not None:
                write_compressed(Path(scratch), form[0].config, form[1].line, form[0].data)
            with attached(self.source, Path(scratch) if form else None) as (adapted, base):
                return [
                    run_suite(f"{title}: {suite.title}", adapted.model, base.tokenizer, suite).value for suite in suites
                ]


@task(task_run_name="register {chosen.steps}", cache_policy=NO_CACHE)
def _register(plan: CompressionPlan, adapter: Adapter, chosen: Form, forms: Sequence[Form]) -> VersionRecord:
    registry, steps = AdapterRegistry(), read_steps(chosen.steps)
    with base_of(plan.source) as base:
        form = compressed(adapter, steps, dict(base.model.state_dict()))
    details = {
        "steps": chosen.steps,
        "ratio": chosen.ratio,
        "allowed_loss": plan.allowed_loss,
        "forms": [each.model_dump(mode="json") for each in forms],
    }
    version = register_derived(
        plan.name,
        plan.source,
        lambda directory: write_compressed(directory, form.config, steps.line, form.data),
        [Parent(plan.source.address, COMPRESSED, details)],
        {"ratio": chosen.ratio},
    )
    kit = registry.attachment(plan.source.address, MIGRATION_KIT)
    if kit is not None:  # so that it can still migrate
        registry.attach(version.address, MIGRATION_KIT, registry.materialise_attachment(kit), kit.details)
    return version


def _within(metric: str, before: float, after: float, allowed_loss: float) -> bool:
    """Whether no more than the allowed loss was lost; the gate of migrations, with nobody else to beat."""
    return Standing("", metric, before, before, after).passes(allowed_loss)


def _report(source: VersionRecord, suites: Sequence[Prepared], before: Sequence[float], forms: Sequence[Form]) -> None:
    report_table(source.adapter, "compression", [form.model_dump() for form in forms])
    report_picture(source.adapter, "compression", front(source.address, suites[0].title, before[0], forms))


def front(address: str, suite: str, before: float, forms: Sequence[Form]) -> bytes:
    """PNG of size against the first suite's value; the front is joined."""
    figure, axes = axes_of_a_picture(6.4, 3.6)
    on_front = [form for form in forms if form.on_front]
    axes.plot([f.size_bytes for f in on_front], [f.values[0] for f in on_front], color="#3b6ea5", linewidth=1)
    for form in forms:
        axes.plot(form.size_bytes, form.values[0], "o", color="#3b6ea5" if form.on_front else "#b8b8b8")
        axes.annotate(
            form.steps, (form.size_bytes, form.values[0]), fontsize=6, xytext=(3, 3), textcoords="offset points"
        )
    axes.axhline(before, color="#c8553d", linewidth=1, linestyle=":")
    axes.set(title=f"{address}, compressed", xlabel="bytes", ylabel=f"{suite} (validation)", xscale="log")
    return as_png(figure)
