"""`transformers.Trainer`, taught about objectives, adapters, whole checkpoints and exact resumption.

From the engine come the loop, gradient accumulation, schedules, mixed precision and data parallelism. What is replaced:
the loss (an `Objective`, normalised over the whole update), the optimiser (the method's own, if it has one), what a
checkpoint holds (adapter, optimiser, schedule and random states, none of it pickled), and validation.
"""

import random
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from infra.errors import RegraftError
from training.checkpoints import Checkpoints
from training.compression.quantised_training import QuantisedTraining
from training.data.batching import Collate
from training.data.encoding import Encoded
from training.interruption import Interruption
from training.methods.contract import Adapted
from training.objectives.objective import Objective
from training.progress import OnEvent, Progress, TrainingEvent
from training.state_file import read_state, write_state

ADAPTER_FILE = "adapter.safetensors"
BEST_FILE = "best.safetensors"
STATE_FILE = "state.safetensors"


class Engine(Trainer):
    """One training of one adapter.

    Args:
        adapted: what is trained.
        objective: what is optimised.
        collate: makes batches of examples.
        train: the examples to train on.
        validation: the examples that the validation loss is taken over, perhaps none.
        arguments: of the engine.
        checkpoints: where they are kept.
        progress: what is behind; not empty where the training is resumed.
        early_stopping: validations without improvement after which it ends, or None.
        interruption: says when to stop.
        on_event: hears of every step, on the first process.
        quantised: where the adapter is trained as it will be stored.
    """

    control: TrainerControl
    optimizer: Any  # accelerate's wrapper, once training has begun

    def __init__(
        self,
        adapted: Adapted,
        objective: Objective,
        collate: Collate,
        train: Sequence[Encoded],
        validation: Sequence[Encoded],
        arguments: TrainingArguments,
        *,
        checkpoints: Checkpoints,
        progress: Progress,
        early_stopping: int | None,
        interruption: Interruption,
        on_event: OnEvent,
        quantised: QuantisedTraining | None = None,
    ) -> None:
        super().__init__(
            model=adapted.model,
            args=arguments,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=validation or None,
            callbacks=[*adapted.callbacks(), _Milestones(interruption, bool(validation and arguments.eval_steps))],
        )
        self.remove_callback(PrinterCallback)
        self.adapted = adapted
        self.objective = objective
        self.checkpoints = checkpoints
        self.progress = progress
        self.early_stopping = early_stopping
        self.interruption = interruption
        self.on_event = on_event
        self.quantised = quantised
        self.best: dict[str, Tensor] = {}
        self._learning_rate = 0.0
        self._uncounted = torch.zeros(2, dtype=torch.int64, device=arguments.device)  # labelled, read
        self._session = (time.perf_counter(), progress.seconds, progress.tokens, len(progress.losses))

    # -- loss ----------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[Mapping[str, Tensor]], device: torch.device) -> Tensor:
        labelled = torch.stack([self.objective.count(batch) for batch in batch_samples]).sum()
        counts = torch.stack([labelled, torch.stack([_read(batch) for batch in batch_samples]).sum()]).to(device)
        if self.args.world_size > 1:
            dist.all_reduce(counts)
        self._uncounted += counts
        return counts[0]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch, without the engine's walk over all modules to set their mode."""
        with self._as_stored():
            loss: Tensor = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
        return loss.detach()

    def _as_stored(self) -> AbstractContextManager[None]:
        return self.quantised.in_force() if self.quantised else nullcontext()

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        del model  # most of its parameters are frozen
        if self.quantised:
            self.quantised.pass_gradients_through()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return torch.nn.utils.clip_grad_norm_(trained, self.args.max_grad_norm)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the update's mean loss, and of the method's own term.

        Data parallelism averages gradients over processes, so the share is multiplied by their number.
        """
        batch = self.adapted.transform_batch(dict(inputs))
        loss = self.objective(model, batch)
        extra = self.adapted.extra_loss(loss.outputs, batch)
        judged = loss.count if num_items_in_batch is None else num_items_in_batch
        share = loss.total / judged * self.args.world_size
        if extra is not None:
            share = share + extra / self.current_gradient_accumulation_steps
        return (share, loss.outputs) if return_outputs else share

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the engine would walk all parameters at every micro-batch for it."""
        del inputs
        return 0

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """The mean validation loss, the method's own term left out; each process judges its part."""
        del arguments, options
        judged = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        size = self.args.per_device_eval_batch_size
        self.model.eval()
        with torch.no_grad(), self._as_stored():
            for first in range(0, len(self.eval_dataset), size * self.args.world_size):
                start = first + size * self.args.process_index
                mine = self.eval_dataset[start : start + size]
                # A sharded base computes only when all processes do: one that has no batch left repeats the first.
                batch = self._prepare_inputs(self.data_collator(mine or self.eval_dataset[:size]))
                loss = self.objective(self.model, self.adapted.transform_batch(batch))
                if mine:
                    judged += torch.tensor([loss.total.item(), loss.count], dtype=torch.float64, device=judged.device)
        self.model.train()
        if self.args.world_size > 1:
            dist.all_reduce(judged)
        mean = (judged[0] / judged[1]).item()
        self._require_finite("validation loss", mean)
        self._note_validation(mean)
        metrics = {"eval_loss": mean}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _note_validation(self, loss: float) -> None:
        step, best = self.state.global_step, self.progress.best
        self.progress.validation_losses.append((step, loss))
        if self.early_stopping and (best is None or loss < best[1]):
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.adapted.tensors().items()}
            self.progress.bad_validations = 0
        elif self.early_stopping:
            self.progress.bad_validations += 1
            if self.progress.bad_validations >= self.early_stopping:
                self.control.should_training_stop = self.control.should_save = True
        self._tell(loss)

    # -- events --------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Note an update's loss, refuse one that is not finite, and tell whoever listens."""
        del start_time
        if "learning_rate" not in logs:  # the engine's summary at the end
            return
        self._require_finite("loss", logs["loss"])
        self._require_finite("gradient", logs.get("grad_norm", 0.0))
        self._learning_rate = logs["learning_rate"]
        self.progress.losses.append((self.state.global_step, logs["loss"]))
        labelled, tokens = self._uncounted.tolist()
        self._uncounted.zero_()
        self.progress.labelled_tokens += labelled
        self.progress.tokens += tokens
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        self._tell(None)

    def _tell(self, validation_loss: float | None) -> None:
        started, seconds_before, tokens_before, steps_before = self._session
        elapsed = time.perf_counter() - started
        self.progress.seconds = seconds_before + elapsed
        if not self.is_world_process_zero():
            return
        step, total = self.state.global_step, self.state.max_steps
        self.on_event(
            TrainingEvent(
                step=step,
                total_steps=total,
                loss=self.progress.losses[-1][1],
                learning_rate=self._learning_rate,
                tokens_per_second=(self.progress.tokens - tokens_before) / elapsed,
                eta_seconds=elapsed / max(1, len(self.progress.losses) - steps_before) * (total - step),
                validation_loss=validation_loss,
            )
        )

    def _require_finite(self, what: str, value: float) -> None:
        if not np.isfinite(value):
            raise RegraftError(
                f"The {what} of step {self.state.global_step} is {value}: the training was stopped.",
                "Lower training.learning_rate or training.max_grad_norm, add training.warmup_steps, or look for broken "
                "examples among the data.",
            )

    # -- optimiser -----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The method's own optimiser, or AdamW over exactly what the method trains."""
        del model
        rate, decay = self.args.learning_rate, self.args.weight_decay
        chosen = self.adapted.optimizer(rate, decay) or torch.optim.AdamW(
            list(self.adapted.trainable().values()), lr=rate, weight_decay=decay, fused=True
        )
        self.optimizer = chosen
        return chosen

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        del model, trial
        states: list[Any] = [_random_state()]
        if self.args.world_size > 1:
            states = [None] * self.args.world_size
            dist.all_gather_object(states, _random_state())
        if not self.is_world_process_zero():
            return

        def fill(directory: Path) -> None:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.adapted.checkpoint().items()}
            save_file(tensors, directory / ADAPTER_FILE)
            if self.best:
                save_file({name: tensor.contiguous() for name, tensor in self.best.items()}, directory / BEST_FILE)
            state = {
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.lr_scheduler.state_dict(),
                "random": states,
            }
            write_state(state, directory / STATE_FILE)
            self.state.save_to_json(str(directory / TRAINER_STATE_NAME))

        self.checkpoints.write(self.state.global_step, self.progress.as_stored(), fill)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        del model
        directory = Path(resume_from_checkpoint)
        self.adapted.resume(load_file(directory / ADAPTER_FILE))
        if (directory / BEST_FILE).is_file():
            self.best = load_file(directory / BEST_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = read_state(Path(checkpoint) / STATE_FILE)
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["schedule"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states = read_state(Path(checkpoint) / STATE_FILE)["random"]
            _set_random_state(states[self.args.process_index])


class _Milestones(TrainerCallback):
    """Validates after the last step, too, and stops at the end of a step when asked to, with a checkpoint."""

    def __init__(self, interruption: Interruption, validates: bool) -> None:
        self.interruption = interruption
        self.validates = validates

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """See `TrainerCallback`."""
        del others
        last, stopping = state.global_step >= state.max_steps, self._asked_to_stop(args)
        # Nothing below may look at `requested`: a signal that comes after all have agreed is for the next step.
        if stopping:
            self.interruption.requested = True
            control.should_training_stop = True
        if last and self.validates:
            control.should_evaluate = True
        if last or stopping:
            control.should_save = True

    def _asked_to_stop(self, args: Any) -> bool:
        """The same answer on every process: one of them was asked."""
        if args.world_size == 1:
            return self.interruption.requested
        asked = torch.tensor(int(self.interruption.requested), device=args.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())


def _read(batch: Mapping[str, Tensor]) -> Tensor:
    """How many positions of a batch the model reads, padding not counted where there is a mask that tells it."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return mask.sum()
    first = next(iter(batch.values()))
    return torch.tensor(first.numel(), device=first.device)


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
