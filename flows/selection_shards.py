"""Work on the shards of a pool: by threads of this process, or by the workers of a Ray cluster."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Concatenate, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed

from flows.gpu import gpu_slot
from flows.progress import Stage
from infra.settings import get_settings
from training.base_models import LoadedBase, load_base
from training.data.prompting import PromptFormat
from training.device import base_dtype, best_device
from training.selection import perplexity
from training.selection.embedding import Encoder, embeddings, load_encoder
from training.selection.pool import Pool, Positions

Given = ParamSpec("Given")
Found = TypeVar("Found")

_one_model_at_a_time = Lock()  # it uses all cores as it is


def spread(
    what: str,
    work: Callable[Concatenate[Pool, Given], Found],
    shards: Sequence[Pool],
    *given: Given.args,
    **_: Given.kwargs,
) -> list[Found]:
    """What comes of each shard, in order. In a flow: its task runner says where the work is done.

    Args:
        what: is done, for people.
        work: of a shard and of what is `given`; a function of a module.
        shards: of one pool.
        given: to all of them.
    """
    stage = Stage(what)
    stage(0, len(shards))
    futures = [_on_shard.submit(work, shard, given, what, place) for place, shard in enumerate(shards, start=1)]
    for done, _future in enumerate(as_completed(list(futures)), start=1):
        stage(done, len(shards))
    return [future.result() for future in futures]


@task(task_run_name="{what}: shard {place}", cache_policy=NO_CACHE)
def _on_shard(work: Callable[..., Any], shard: Pool, given: tuple[Any, ...], what: str, place: int) -> Any:
    del what, place
    return work(shard, *given)


def embed(shard: Pool, reference: str) -> tuple[Positions, Path]:
    """Positions of a shard's rows, and the file of their vectors in the same order; kept for the next selection."""
    import numpy as np

    positions = [block.positions for block in shard.blocks()]
    stage = Stage("embed rows")
    with _one_model_at_a_time, gpu_slot(best_device()):
        stored = embeddings(_Texts(shard), encoder_named(reference), embeddings_folder(), on_progress=stage)
    assert isinstance(stored, np.memmap) and stored.filename is not None
    return np.concatenate(positions), Path(stored.filename)


@lru_cache(maxsize=1)
def encoder_named(reference: str) -> Encoder:
    """An encoder, loaded once for all shards."""
    return load_encoder(reference, bases=get_settings().base_models, device=best_device())


def embeddings_folder() -> Path:
    """Where vectors of texts are kept from one selection to the next."""
    return get_settings().home / "embeddings"


def surprise(shard: Pool, base: str, file: Path) -> perplexity.Scores:
    """Perplexities of a shard's rows by a base model; of completions, where the rows have such, after their prompts."""
    with _one_model_at_a_time, gpu_slot(best_device()):
        loaded = _base(base)
        prompts = PromptFormat(loaded.tokenizer)
        longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", 2**20)
        as_text = shard.columns.text is not None
        pair = perplexity.text_pair(prompts, longest) if as_text else perplexity.completion_pair(prompts)
        return perplexity.score(
            shard,
            loaded.model,
            pair,
            file=file.with_name(f"{file.name}-{shard.pieces[0].position}.jsonl"),
            scorer=f"{loaded.identity.sha256} {shard.columns.text or 'completion'}",
            on_progress=Stage("ask the base model"),
        )


@lru_cache(maxsize=1)
def _base(reference: str) -> LoadedBase:
    device = best_device()
    return load_base(reference, cache=get_settings().base_models, dtype=base_dtype(device), device=device)


class _Texts:
    """The texts of a shard, that can be read again and again."""

    def __init__(self, shard: Pool) -> None:
        self.shard = shard

    def __iter__(self) -> Any:
        return (text for block in self.shard.blocks() for text in block.texts)
