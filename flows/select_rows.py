"""Choose rows of a candidate pool of any size, and keep them as the next version of a data set."""

import hashlib
import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BaseModel, ConfigDict

from flows.data_sets import ROWS
from flows.progress import Stage
from flows.ray_cluster import one_worker_each, ray_runner
from flows.reports import report_table
from flows.run_states import cancel_if_interrupted
from flows.selection_report import Samples, selection_page
from flows.selection_samples import evaluation_sets_of, target_of
from flows.selection_shards import embed, embeddings_folder, encoder_named, spread, surprise
from infra.errors import InvalidInput
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.addresses import adapter_name
from training.checkpoints import exclusive
from training.data.example import Example
from training.data.example import fingerprint as fingerprint_of
from training.device import best_device
from training.selection import coverage, decontamination, dsir, gotd, near_duplicates, perplexity
from training.selection.embedding import embeddings
from training.selection.options import BY_EMBEDDING, LIKE_A_TARGET, SCORES, PoolSelection
from training.selection.pool import Pool, Positions, content_sum, fingerprint, open_pool
from training.selection.rows import Stacked

logger = logging.getLogger(__name__)

PAGE = "selection.html"
_SHOWN = 2000  # most rows of the pool, the target and the selection that the page shows


class EvaluationSet(BaseModel):
    """How much of an evaluation set was in a pool."""

    model_config = ConfigDict(frozen=True)

    set: str
    items: int
    hit: int


class SelectedRows(BaseModel):
    """A data set of selected rows, and what was left out; `again` where it was there already, just like this."""

    model_config = ConfigDict(frozen=True)

    address: str
    again: bool
    rows: int
    pool: int
    unusable: int
    duplicates: int
    contaminated: int
    evaluation_sets: tuple[EvaluationSet, ...]
    method: str
    warnings: tuple[str, ...]
    page: Path
    seconds: float


@dataclass(frozen=True)
class _Chosen:
    """The rows that could be chosen and their scores, both in the pool's order; and which of them were."""

    positions: Positions
    scores: NDArray[np.float64]
    selected: NDArray[np.bool_]
    samples: Samples | None = None
    warnings: tuple[str, ...] = ()


@dataclass
class _Left:
    """What is left of a pool, and what went."""

    pool: Pool
    rows: int
    unusable: int = 0
    fingerprint: str = ""
    duplicates: int = 0
    contaminated: int = 0
    hits: list[EvaluationSet] = field(default_factory=list)


def select_rows(name: str, options: PoolSelection) -> SelectedRows:
    """Choose rows of a pool and keep them with their scores; the same choice of the same rows is found again.

    Threads of this process share the work, or the workers of the Ray cluster that the settings name.

    Args:
        name: of the data set.
        options: which rows, of which pool.

    Raises:
        NotFound, InvalidInput: a pool, target or evaluation set that cannot be read, or a budget above what is left.
        Conflict: the same selection is at work in another process.
    """
    adapter_name(name)
    runner: Any = ray_runner() or ThreadPoolTaskRunner(max_workers=_threads())
    return _select_rows.with_options(task_runner=runner)(name, options)


@flow(name="select-rows", flow_run_name="select rows for {name}", on_failure=[cancel_if_interrupted])
def _select_rows(name: str, options: PoolSelection) -> SelectedRows:
    began = time.monotonic()
    target, evaluation_sets = target_of(options), evaluation_sets_of(options)
    pool = open_pool(options.pool, options.columns, options.on_bad)
    workdir = get_settings().runs / f"select-{name}-{_digest(options)}"
    with exclusive(workdir), one_worker_each() if get_settings().ray else nullcontext():
        left = _cleaned(pool, options, evaluation_sets)
        if options.budget and options.budget > left.pool.rows - left.unusable:
            raise InvalidInput(
                f"The budget is {options.budget:,} rows, but of the pool's {left.rows:,} only "
                f"{left.pool.rows - left.unusable:,} are left to choose from.",
                "Lower the budget, or add to the pool.",
            )
        chosen = _chosen(left.pool, options, target, workdir)
        for warning in chosen.warnings:
            logger.warning("%s", warning)
        with TemporaryDirectory(dir=workdir, prefix="rows-") as scratch:
            folder = Path(scratch) / "kept"
            folder.mkdir()
            names = _write(left.pool, chosen, folder / ROWS)
            page = selection_page(
                name,
                _steps(left, chosen),
                [each.model_dump() for each in left.hits],
                chosen.scores,
                chosen.selected,
                SCORES[options.method],
                chosen.samples,
                chosen.warnings,
            )
            (folder / PAGE).write_text(page, encoding="utf-8")
            registry = AdapterRegistry()
            before = {each.address for each in registry.datasets()}
            record = registry.keep_dataset(
                name, folder, fingerprint=names, rows=int(chosen.selected.sum()), origin=_origin(options, left)
            )
    shutil.rmtree(workdir, ignore_errors=True)
    report_table(name, "selection", _steps(left, chosen))
    return SelectedRows(
        address=record.address,
        again=record.address in before,
        rows=record.rows,
        pool=left.rows,
        unusable=left.unusable,
        duplicates=left.duplicates,
        contaminated=left.contaminated,
        evaluation_sets=tuple(left.hits),
        method=options.method,
        warnings=chosen.warnings,
        page=registry.materialise_dataset(record.address) / PAGE,
        seconds=time.monotonic() - began,
    )


def _cleaned(pool: Pool, options: PoolSelection, evaluation_sets: dict[str, list[Example]]) -> _Left:
    """The pool without duplicates, and without pieces of evaluation sets."""
    left = _Left(pool, pool.rows)
    sums = spread("read the pool", _read, _shards(pool, options))
    left.fingerprint, left.unusable = fingerprint(found for found, *_ in sums), sum(skipped for _, skipped, _ in sums)
    if left.unusable:
        first = next(why for _, _, why in sums if why)
        logger.warning("%s of %s rows are left out, the first: %s", f"{left.unusable:,}", f"{left.rows:,}", first)
    if options.deduplicate != "none":
        hashes = spread("find equal rows", near_duplicates.content_hashes, _shards(left.pool, options))
        _drop(left, near_duplicates.repeated(hashes).dropped)
    if options.deduplicate == "near":
        with TemporaryDirectory(dir=get_settings().runs, prefix="sketches-") as scratch:
            work = partial(_sketched, root=Path(scratch), threshold=options.similarity)
            folders = spread("sketch rows", work, _shards(left.pool, options))
            _drop(left, near_duplicates.judge(left.pool, folders, options.similarity).dropped)
    if evaluation_sets:
        known = decontamination.index(evaluation_sets)
        overlaps = spread("look for evaluation items", decontamination.overlaps, _shards(left.pool, options), known)
        found = decontamination.report(known, overlaps)
        left.contaminated = len(found.dropped)
        left.pool = left.pool.without(found.dropped)
        left.hits = [EvaluationSet(set=name, items=found.sizes[name], hit=hit) for name, hit in found.items_hit.items()]
    return left


def _drop(left: _Left, dropped: Positions) -> None:
    left.duplicates += len(dropped)
    left.pool = left.pool.without(dropped)


def _chosen(pool: Pool, options: PoolSelection, target: Sequence[Example], workdir: Path) -> _Chosen:
    """The rows by the method of the options."""
    shards, texts = _shards(pool, options), [example.text for example in target]
    if options.method in BY_EMBEDDING:
        return _by_embedding(shards, options, texts)
    if options.method == "dsir":
        counts = np.sum(spread("count words", dsir.pool_counts, shards), axis=0)
        ratio = dsir.log_ratio(texts, counts)
        weights = dsir.together(spread("weigh rows", dsir.weigh, shards, ratio))
        rows = dsir.gumbel_top(weights.log_weights, _budget(options), options.seed)
        return _Chosen(weights.positions, weights.log_weights, _marked(len(weights.positions), rows))
    if options.method == "perplexity":
        assert options.base is not None
        scores = perplexity.together(spread("perplexity", surprise, shards, options.base, workdir / "scores"))
        kept = perplexity.lowest(scores, options.share, floor=options.floor, bands=options.bands)
        failed = f"{len(scores.failures):,} rows have no perplexity: {scores.failures[0][1]}" if scores.failures else ""
        selected = np.isin(scores.positions, kept)
        return _Chosen(scores.positions, scores.perplexities, selected, warnings=(failed,) if failed else ())
    positions = np.concatenate(spread("number rows", _positions, shards))
    order = coverage.random(len(positions), _budget(options), options.seed)
    return _taken(positions, order)


def _by_embedding(shards: Sequence[Pool], options: PoolSelection, texts: Sequence[str]) -> _Chosen:
    import torch

    embedded = spread("embed rows", embed, shards, options.encoder)
    positions = np.concatenate([found for found, _ in embedded])
    rows = Stacked([np.load(file, mmap_mode="r") for _, file in embedded])
    target = torch.empty(0, rows.shape[1])
    if options.method in LIKE_A_TARGET:
        stored = embeddings(texts, encoder_named(options.encoder), embeddings_folder())
        target = torch.from_numpy(np.array(stored, np.float32)).to(best_device())
    budget, warnings = _budget(options), tuple[str, ...]()
    if options.method == "got-d":
        found = gotd.choose(
            target,
            rows,
            budget,
            direction=options.direction,
            epsilon=options.epsilon,
            seed=options.seed,
            on_progress=Stage("transport"),
        )
        warnings = (found.transport.warning,) if found.transport.warning else ()
        chosen = _Chosen(positions, found.scores, _marked(len(positions), found.rows))
    elif options.method == "nearest":
        chosen = _taken(positions, coverage.nearest_neighbours(target, rows, budget))
    else:
        chosen = _taken(positions, coverage.k_centre(rows, budget, seed=options.seed, device=best_device()))
    samples = Samples(
        _some(rows, np.arange(len(positions)), options.seed),
        target.cpu().numpy()[:_SHOWN],
        _some(rows, np.flatnonzero(chosen.selected), options.seed),
    )
    return _Chosen(positions, chosen.scores, chosen.selected, samples, warnings)


def _taken(positions: Positions, order: NDArray[np.int64]) -> _Chosen:
    """A choice whose only scores are the places at which rows were taken; those that were not come last, all alike."""
    scores = np.full(len(positions), float(len(order)))
    scores[order] = np.arange(len(order))
    return _Chosen(positions, scores, _marked(len(positions), order))


def _marked(rows: int, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    marks = np.zeros(rows, np.bool_)
    marks[chosen] = True
    return marks


def _some(rows: Stacked, among: NDArray[np.int64], seed: int) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).permutation(among)[:_SHOWN]
    return np.asarray(rows[np.sort(drawn)], np.float32)


def _budget(options: PoolSelection) -> int:
    assert options.budget is not None
    return options.budget


def _write(pool: Pool, chosen: _Chosen, file: Path) -> str:
    """Write the selected rows with their scores and where they come from; returns their fingerprint."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    positions, scores = chosen.positions[chosen.selected], chosen.scores[chosen.selected]
    kept: list[Example] = []
    layout = ("text",) if pool.columns.text else ("prompt", "completion")
    fields = [(name, pyarrow.string()) for name in layout]
    if pool.columns.choices:
        fields.append(("choices", pyarrow.list_(pyarrow.string())))
    if pool.columns.tests:
        fields.append(("tests", pyarrow.string()))
    fields += [("score", pyarrow.float64()), ("source", pyarrow.string()), ("row", pyarrow.int64())]
    schema, written = pyarrow.schema(fields), 0
    stage = Stage("write rows")
    with ParquetWriter(file, schema) as writer:
        for block in pool.only(positions).blocks():
            rows = []
            for position, example in zip(block.positions.tolist(), block.examples, strict=True):
                source, number = pool.origin(position)
                told = {"text": example.prompt, "prompt": example.prompt, "completion": example.completion}
                extra = {"choices": list(example.choices), "tests": example.tests, "score": float(scores[written])}
                rows.append({**told, **extra, "source": source, "row": number})
                written += 1
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            kept += block.examples
            stage(written, len(positions))
    return fingerprint_of(kept)


def _steps(left: _Left, chosen: _Chosen) -> list[dict[str, Any]]:
    steps = [
        {"step": "pool", "rows": left.rows},
        {"step": "cannot be used", "rows": -left.unusable},
        {"step": "duplicates", "rows": -left.duplicates},
        {"step": "hold a piece of an evaluation set", "rows": -left.contaminated},
        {"step": "not chosen", "rows": -int((~chosen.selected).sum())},
        {"step": "selected", "rows": int(chosen.selected.sum())},
    ]
    return [step for step in steps if step["rows"]]


def _origin(options: PoolSelection, left: _Left) -> dict[str, Any]:
    return {
        "selection": options.model_dump(mode="json", exclude_unset=True, exclude={"shard_rows"}),
        "score": SCORES[options.method],
        "pool": {"rows": left.rows, "fingerprint": left.fingerprint},
        "dropped": {
            "unusable": left.unusable,
            "duplicates": left.duplicates,
            "contaminated": left.contaminated,
        },
        "evaluation_sets": [each.model_dump() for each in left.hits],
    }


def _digest(options: PoolSelection) -> str:
    return hashlib.sha256(options.model_dump_json().encode()).hexdigest()[:12]


def _shards(pool: Pool, options: PoolSelection) -> list[Pool]:
    shards = pool.shards(ceil(pool.rows / options.shard_rows)) if pool.rows else []
    return [shard for shard in shards if shard.rows]


def _threads() -> int:
    return get_settings().threads or 2


def _read(shard: Pool) -> tuple[int, int, str]:
    """Content sum of a shard's rows, how many cannot be used, and what is wrong with the first of these."""
    total, skipped, why = 0, 0, ""
    for block in shard.blocks():
        total += content_sum(block.examples)
        skipped, why = skipped + block.skipped, why or block.why
    return total, skipped, why


def _sketched(shard: Pool, root: Path, threshold: float) -> Path:
    folder = root / f"{shard.pieces[0].position:015}"
    folder.mkdir()
    near_duplicates.sketch(shard, folder, threshold)
    return folder


def _positions(shard: Pool) -> Positions:
    return np.concatenate([block.positions for block in shard.blocks()])
