"""Choose what to train on: read the sources, drop what is too long or there twice, draw a seeded sample."""

from dataclasses import dataclass

from prefect import flow

from flows.base_models import find_base
from flows.data_sets import readable
from flows.reports import report_table
from infra.errors import InvalidInput
from training.base_models import load_tokenizer
from training.data.example import Example, fingerprint
from training.data.prompting import PromptFormat
from training.data.sources import load_splits
from training.recipe import Recipe
from training.selection.selection import select


@dataclass(frozen=True)
class SelectedData:
    """The examples of a training, and what selection did."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    read: int
    dropped: dict[str, int]

    @property
    def fingerprint(self) -> str:
        """Names the content of the training examples, in order."""
        return fingerprint(self.train)

    def __repr__(self) -> str:
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items() if count) or "none"
        return f"SelectedData({len(self.train)} of {self.read}, {len(self.validation)} to validate; dropped: {dropped})"


@flow(name="select-data", flow_run_name="select data for {recipe.adapter}")
def select_data(recipe: Recipe) -> SelectedData:
    """Read the recipe's data and choose the training examples.

    Lengths are counted in tokens of the recipe's base model.
    """
    splits = load_splits(readable(recipe.data), recipe.seed)
    _, folder = find_base(recipe.base)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise InvalidInput(f"{recipe.base} has no tokenizer, so it cannot be trained on text.", "Choose another base.")
    prompts = PromptFormat(tokenizer, recipe.data.instruction_text)

    def tokens(example: Example) -> int:
        prompt, completion = prompts.training_text(example)
        return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, completion))

    chosen = select(splits.train, recipe.selection, recipe.seed, tokens)
    selected = SelectedData(tuple(chosen.examples), splits.validation, len(splits.train), dict(chosen.dropped))
    rows = [{"step": "read", "examples": selected.read}]
    rows += [{"step": f"dropped: {reason}", "examples": -count} for reason, count in selected.dropped.items()]
    rows += [
        {"step": "train", "examples": len(selected.train)},
        {"step": "validate", "examples": len(selected.validation)},
    ]
    report_table(recipe.adapter, "selection", rows)
    return selected
