"""What a federation is to do: the clients' data, and how each trains in a round."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from flows.base_models import find_base
from flows.select_data import select_data
from infra.errors import InvalidInput
from infra.settings import get_settings
from registry.addresses import adapter_name
from registry.records import BaseModelRecord
from training.base_models import BaseFolder, skeleton
from training.data.example import Example, fingerprint
from training.federation.options import FederationOptions
from training.federation.shards import shards
from training.federation.start import CommonStart
from training.methods.targets import linear_modules, select, shape
from training.options import MethodChoice
from training.recipe import Recipe


@dataclass(frozen=True)
class FederationPlan:
    """What all rounds share. Clients are counted from 0, rounds from 1."""

    recipe: Recipe
    options: FederationOptions
    base: BaseModelRecord
    parts: tuple[tuple[Example, ...], ...]

    @property
    def workdir(self) -> Path:
        """Where what is done so far lies; of these settings and data alone, wherever the clients run."""
        told = {
            "recipe": self.recipe.as_stored(),
            "options": self.options.model_dump(mode="json", exclude={"runner"}),
            "base": self.base.identity_sha256,
            "parts": [fingerprint(part) for part in self.parts],
        }
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
        return get_settings().runs / f"federate-{self.recipe.adapter}-{digest}"

    @property
    def ranks(self) -> list[int]:
        """Of each client's LoRA."""
        return [self.options.ranks[client % len(self.options.ranks)] for client in range(self.options.clients)]

    def of_client(self, client: int, number: int) -> Recipe:
        """How a client trains in a round: fresh, with a rank of its own."""
        rank = self.ranks[client]
        method = MethodChoice(name="lora", **{**self.recipe.method.options, "rank": rank, "alpha": 2 * rank})
        training = self.recipe.training.model_copy(update={"validate_every": None, "early_stopping": None})
        return self.recipe.model_copy(
            update={
                "adapter": client_name(self.recipe, client),
                "method": method,
                "training": training,
                "seed": (self.recipe.seed + 1000 * number + client) % 2**32,
                "made_of": (),
            }
        )

    def start(self, number: int) -> CommonStart | None:
        """What all clients of a round begin with, where the mean of their factors is to mean something."""
        if self.options.aggregation == "stack":
            return None
        return CommonStart((self.recipe.seed + 1000 * number) % 2**32, max(self.options.ranks))


def client_name(recipe: Recipe, client: int) -> str:
    """The adapter whose versions are what a client handed in."""
    return f"{recipe.adapter}-client-{client}"


def plan_federation(recipe: Recipe, options: FederationOptions) -> FederationPlan:
    """The clients' data, after every check that needs no weights.

    Raises:
        InvalidInput: another method than lora, a training on several processes, a name with no room for the clients',
            fewer examples than clients, or ranks above what the base's layers can take.
    """
    for name in (recipe.adapter, client_name(recipe, options.clients - 1)):
        adapter_name(name)
    if recipe.method.name != "lora":
        raise InvalidInput(
            f"Clients hand in LoRAs; the recipe's method is {recipe.method.name}.", "Set method.name to lora."
        )
    if recipe.training.processes > 1:  # which would load the base anew, without the global adapter in it
        raise InvalidInput(
            f"training.processes is {recipe.training.processes}; a client trains in one process.",
            "Leave it out: --set training.processes=1",
        )
    record, folder = find_base(recipe.base)
    data = select_data(recipe)
    if len(data.train) < options.clients:
        raise InvalidInput(
            f"{len(data.train)} examples cannot be parted among {options.clients} clients.", "Ask for fewer clients."
        )
    parts = shards(data.train, options.clients, options.skew, recipe.seed)
    plan = FederationPlan(recipe, options, record, tuple(map(tuple, parts)))
    _check_ranks(plan, folder)
    return plan


def _check_ranks(plan: FederationPlan, folder: BaseFolder) -> None:
    """As a client would, but before any of them trains."""
    model, config = skeleton(folder), plan.recipe.method_config()
    layers = linear_modules(model)
    most = max(min(shape(layers[name])) for name in select(model, config.targets, config.exclude))
    if max(plan.ranks) > most:
        raise InvalidInput(
            f"A client's rank is {max(plan.ranks)}; the largest that any of the layers can take is {most}.",
            f"Give lower ones, e.g. --ranks {','.join(str(min(rank, most)) for rank in plan.ranks)}",
        )
