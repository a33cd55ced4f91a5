"""What a selection compares a pool with: its target and its evaluation sets, read as the pool is."""

from flows.data_sets import readable
from infra.documents import did_you_mean
from infra.errors import InvalidInput, NotFound
from training.data.example import Example
from training.data.rows import Columns
from training.data.sampling import sample
from training.data.sources import DataSource, first_row, read_examples
from training.selection.options import DEFAULT_TARGET_ITEMS, PoolSelection
from training.tasks.catalog import CATALOG, get_task


def target_of(options: PoolSelection) -> list[Example]:
    """What the rows are to resemble: as many examples as the target's `sizes.train` says, or all; none without one.

    Raises:
        InvalidInput: columns or rows that cannot be used.
        NotFound: no such file or data set.
    """
    source = options.target
    if source is None:
        return []
    if source.task:
        return list(get_task(source.task).generate("train", source.sizes.train or DEFAULT_TARGET_ITEMS, options.seed))
    found = _read(source, options.columns, "target.")
    return list(sample(found, source.sizes.train, options.seed)) if source.sizes.train else found


def evaluation_sets_of(options: PoolSelection) -> dict[str, list[Example]]:
    """The sets of which no piece may stay, by name: all of a file or data set; of a task, what suites draw from.

    Raises:
        InvalidInput, NotFound: as `target_of`.
    """
    return {
        source.name: list(get_task(source.task).generate("test", source.sizes.test or DEFAULT_TARGET_ITEMS, 0))
        if source.task
        else _read(source, options.columns, f"decontaminate[{number}].")
        for number, source in enumerate(options.decontaminate)
    }


def _read(source: DataSource, pool: Columns, keys: str) -> list[Example]:
    """Every example; `keys` is what the source's options begin with, for messages."""
    try:
        source = readable(source)
    except NotFound as error:
        tasks = did_you_mean(str(source.selected), list(CATALOG))  # a word may have been meant for one
        raise NotFound(error.what, f"If it is a task: {tasks} If not: {error.remedy}") from None
    if "columns" not in source.model_fields_set:
        source = source.model_copy(update={"columns": _columns(source, pool, keys)})
    return read_examples(source, keys)


def _columns(source: DataSource, pool: Columns, keys: str) -> Columns:
    """Where nothing is said: the pool's, else prompt and completion, else plain text."""
    row = first_row(source)
    if row is None:
        return source.columns
    place, values = row
    answers = Columns() if pool.text or pool.messages else Columns(prompt=pool.prompt, completion=pool.completion)
    for columns in (pool, answers, Columns(), Columns(text="text")):
        if set(columns.names) <= values.keys():
            return columns
    raise InvalidInput(
        f"{place} has neither the pool's columns ({', '.join(pool.names)}), nor prompt and completion, nor text.",
        f"It has: {', '.join(values) or 'nothing'}. Name its columns with {keys}columns.",
    )
