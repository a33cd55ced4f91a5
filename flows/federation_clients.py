"""The clients of a federation: one after the other in this process, or as nodes of Flower."""

from collections.abc import Iterator, Sequence

from flows.federation_plan import FederationPlan
from flows.progress import Stage
from infra.errors import Interrupted, InvalidInput
from infra.settings import get_settings
from training.federation.client import TRAINING, Clients, folded_base, folder, told, train_client
from training.merging.adapter import Adapter
from training.progress import TrainingEvent

FLOWER = "In an environment of its own, since flwr asks for older packages: pip install 'regraft[flower]'"


def clients_of(plan: FederationPlan) -> Clients:
    """The clients, where the options say that they run.

    Raises:
        InvalidInput: Flower is not installed, or not as it can be used here.
    """
    return _on_flower(plan) if plan.options.runner == "flower" else Here(plan)


class Here:
    """Clients that train one after the other, in this process, on one copy of the base."""

    def __init__(self, plan: FederationPlan) -> None:
        self._plan = plan

    def train(self, number: int, wanted: Sequence[int], whole: Adapter | None) -> Iterator[tuple[int, Adapter | str]]:
        """See `Clients.train`."""
        plan = self._plan
        base = folded_base(plan.base.reference, plan.base.identity_sha256, plan.recipe.training.precision, whole)
        for client in wanted:
            stage = Stage(f"federate {plan.recipe.adapter}: round {number}, client {client}")

            def on_event(event: TrainingEvent, stage: Stage = stage) -> None:
                stage(event.step, event.total_steps, f"loss {event.loss:.3f}")

            workdir = folder(plan.workdir, number, client) / TRAINING
            try:
                recipe, start = plan.of_client(client, number), plan.start(number)
                adapter = train_client(recipe, base, plan.parts[client], workdir, on_event, start)
            except Interrupted:
                raise
            except Exception as error:
                yield client, told(error)
            else:
                yield client, adapter


def _on_flower(plan: FederationPlan) -> Clients:
    try:
        from training.federation.flower import FlowerClients
    except ImportError:
        raise InvalidInput("--runner flower: Flower (flwr and its ray) is not installed here.", FLOWER) from None
    except Exception as error:  # protobuf's, where it is newer than flwr can do with
        raise InvalidInput(f"--runner flower: flwr is installed here, but does not load ({error}).", FLOWER) from None

    stages: dict[int, Stage] = {}

    def on_done(number: int, done: int, total: int) -> None:
        stage = stages.setdefault(number, Stage(f"federate {plan.recipe.adapter}: round {number}"))
        stage(done, total, "clients")

    return FlowerClients(
        plan.parts,
        recipe_of=plan.of_client,
        start_of=plan.start,
        reference=plan.base.reference,
        identity=plan.base.identity_sha256,
        workdir=plan.workdir,
        on_done=on_done,
        ray=get_settings().ray,
    )
