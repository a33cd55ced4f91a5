"""From an address to a model that generates, in one call.

from serving.loading import load
model = load("counting@production")
print(model.generate(["I have two pears, a drum and three cats. How many things do I have?"])[0])
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.errors import InvalidInput
from infra.settings import Settings, get_settings
from registry import AdapterRegistry
from registry.records import VersionRecord
from training.adapter_files import attach_stored
from training.base_models import LoadedBase, load_base
from training.data.prompting import PromptFormat
from training.device import base_dtype, best_device
from training.evaluation.generation import end_tokens, greedy_answers
from training.methods.catalog import get_method
from training.methods.contract import Adapted
from training.objectives.of_model import is_masked_lm
from training.recipe import Recipe


@dataclass(frozen=True)
class LoadedAdapter:
    """A version on its base model, ready to use."""

    version: VersionRecord
    base: LoadedBase = field(repr=False)
    adapted: Adapted = field(repr=False)

    @property
    def model(self) -> Any:
        """The model with the adapter in force; called like the base model."""
        return self.adapted.model

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return self.base.tokenizer

    @property
    def recipe(self) -> Recipe | None:
        """What the version was trained by; None where it was imported."""
        return recipe_of(self.version)

    @property
    def prompt_format(self) -> PromptFormat:
        """How the version was asked in training."""
        return PromptFormat(self.tokenizer, self.recipe.data.instruction_text if self.recipe else "")

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """Greedy answers, in the prompt format that the adapter was trained in.

        Raises:
            InvalidInput: the base is a masked language model.
        """
        if is_masked_lm(self.model):
            raise InvalidInput(
                f"{self.version.address} stands on a masked language model, which fills words in but writes no text.",
                "Use it from Python: serving.loading.load, then .model.",
            )
        form = self.prompt_format
        asked = [self.tokenizer(form.prompt(prompt), add_special_tokens=False)["input_ids"] for prompt in prompts]
        return greedy_answers(
            self.model,
            self.tokenizer,
            asked,
            max_new_tokens=max_new_tokens,
            ends=end_tokens(self.model, self.tokenizer, form),
            stop_strings=form.stop_strings,
        )


def recipe_of(version: VersionRecord) -> Recipe | None:
    """What a version was trained by; None where it was imported."""
    return Recipe.model_validate(version.recipe) if "data" in version.recipe else None


def load(address: str, settings: Settings | None = None) -> LoadedAdapter:
    """Load a version on the base model it was trained on; every byte of both is checked against the registry.

    Args:
        address: `name@3`, `name@production`, or `name` (its production version, else its newest).

    Raises:
        NotFound: no such version, or its base model is not to be had here.
        CorruptArtifact: the stored bytes are not what was registered.
        BaseModelMismatch: the reference of its base model leads to another model today.
    """
    settings = settings or get_settings()
    registry = AdapterRegistry(settings)
    version = registry.get(address)
    directory = registry.materialise(version.address)
    recipe, device = recipe_of(version), best_device()
    base = load_base(
        version.base.reference,
        cache=settings.base_models,
        dtype=base_dtype(
            device,
            recipe.training.precision if recipe else "auto",
            trained=get_method(version.method).card.changes_base,
        ),
        device=device,
    )
    registry.require_base(version, base.identity.sha256)
    adapted = attach_stored(base.model, directory, base_identity=base.identity.sha256)
    adapted.model.eval()
    return LoadedAdapter(version, base, adapted)
