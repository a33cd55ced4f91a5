"""Training an adapter: from a recipe and a base model to trained tensors, resumable at any point."""

import hashlib
import json
import math
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from infra.errors import Interrupted, InvalidInput, RegraftError
from infra.settings import get_settings
from training.checkpoints import Checkpoint, Checkpoints, checkpoints_directory, exclusive
from training.compression.quantised_training import QuantisedTraining
from training.data.batching import Collate, Packing, Padding
from training.data.encoding import Encoded, encode, encode_masked
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.engine import Engine
from training.freed_memory import freed_memory_kept
from training.fused_layers import fused_layers
from training.interruption import awaited_interruption
from training.methods.catalog import get_method
from training.methods.contract import Adapted, AttachContext, Batch
from training.methods.starts import StartCache
from training.objectives.distillation import Distilled, SoftPadding, require_distillable, softened
from training.objectives.objective import Objective
from training.objectives.of_model import is_masked_lm, objective_of
from training.options import TrainingOptions
from training.packing_check import check_packing
from training.progress import OnEvent, OnPreparing, Progress, TrainingOutcome
from training.recipe import Recipe

if TYPE_CHECKING:
    from training.base_models import LoadedBase

DEFAULT_EPOCHS = 3.0
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def train_recipe(
    recipe: Recipe,
    base: "LoadedBase",
    train_examples: Sequence[Example],
    validation_examples: Sequence[Example],
    *,
    workdir: Path,
    on_event: OnEvent,
    on_preparing: OnPreparing | None = None,
    distilled: Distilled | None = None,
    start: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> tuple[Adapted, TrainingOutcome]:
    """Attach the recipe's adapter to the base model and train it on the examples, on `training.processes` processes.

    A training in `workdir` that was interrupted or killed goes on where its last checkpoint is, to the tensors that it
    would have come to without the interruption.

    Args:
        recipe: method, training options and seed come from it; its data and selection were applied already.
        base: in memory, on the device to train on.
        train_examples: what to train on.
        validation_examples: what the validation loss is taken over, perhaps none.
        workdir: for checkpoints; of this training alone.
        on_event: hears of every step.
        on_preparing: hears how far a long initialisation of the adapter is.
        distilled: soft labels of the examples to train on, to learn beside their completions; on one process.
        start: makes the tensors to begin with of those of the fresh adapter; on one process.

    Raises:
        InvalidInput: an example is too long or has nothing to learn, the options do not go with the model, or a
            recipe cannot train such a model.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        Conflict: another training is at work in `workdir`, or it holds checkpoints of another recipe.
        RegraftError: the loss is no number, the GPU's memory does not suffice, or the disk is full.
    """
    options = recipe.training
    if base.tokenizer is None:
        raise InvalidInput(f"{base.reference} has no tokenizer, so it cannot be trained on text.")
    objective = distilled.objective if distilled else objective_of(base.model)
    encoded, held_out = (
        _encoded(recipe, base, examples, seed)
        for seed, examples in enumerate((train_examples, validation_examples), start=recipe.seed)
    )
    if distilled:
        require_distillable(options)
    if options.processes > 1 and not in_worker():
        from training.launch import launch

        return launch(recipe, base, train_examples, validation_examples, workdir=workdir, on_event=on_event)
    if (threads := get_settings().threads) and not in_worker():
        torch.set_num_threads(threads)
    pad = base.tokenizer.pad_token_id
    padding = Padding(pad if pad is not None else 0)
    learnt: Sequence[Encoded] = softened(encoded, distilled.labels) if distilled else encoded
    context = AttachContext(
        seed=recipe.seed,
        processor=base.tokenizer,
        calibration=lambda: _calibration(encoded, padding, options.batch_size, recipe.seed),
        total_steps=total_steps(options, len(encoded)),
        starts=StartCache(
            get_settings().starts, base.identity.sha256, f"{_fingerprint(encoded)} by {options.batch_size}"
        ),
        progress=on_preparing,
    )
    adapted = get_method(recipe.method.name).attach(base.model, recipe.method_config(), context)
    if start is not None:
        adapted.restore(start(adapted.tensors()))
    outcome = train(
        adapted,
        objective,
        learnt,
        held_out,
        options,
        padding=SoftPadding(padding.pad) if distilled else padding,
        seed=recipe.seed,
        workdir=workdir,
        on_event=on_event,
        identity=f"{recipe.digest} {base.identity.sha256}",
    )
    return adapted, outcome


def _encoded(recipe: Recipe, base: "LoadedBase", examples: Sequence[Example], seed: int) -> list[Encoded]:
    """Examples as the base reads them; of a masked language model the seed draws what is hidden.

    Plain texts are learnt whole, in no prompt format.
    """
    options, tokenizer = recipe.training, base.tokenizer

    def named(number: int) -> str:
        return examples[number - 1].place or f"Example {number}"

    if is_masked_lm(base.model):
        return encode_masked(
            (example.text for example in examples),
            tokenizer,
            max_length=min(options.max_length, getattr(base.model.config, "max_position_embeddings", 2**30)),
            generator=torch.Generator().manual_seed(seed),
            named=named,
        )
    prompts = PromptFormat(tokenizer, recipe.data.instruction_text)
    plain = bool(examples) and not any(example.completion for example in examples)
    texts = (("", prompts.plain_text(example.prompt)) for example in examples)
    return encode(
        texts if plain else map(prompts.training_text, examples),
        tokenizer,
        max_length=options.max_length,
        loss_on="everything" if plain else options.loss_on,
        named=named,
    )


def train(
    adapted: Adapted,
    objective: Objective,
    examples: Sequence[Encoded],
    validation: Sequence[Encoded],
    options: TrainingOptions,
    *,
    padding: Padding,
    seed: int,
    workdir: Path,
    on_event: OnEvent,
    identity: str = "",
) -> TrainingOutcome:
    """Train an adapter where its model is, CPU or GPU, and leave the trained tensors in it.

    In the processes of a data-parallel launch this is one of them, and the parent holds `workdir`. The global random
    state is left as it was.

    Args:
        adapted: what to train.
        objective: what to optimise.
        examples: what to train on.
        validation: what the validation loss is taken over, perhaps none.
        options: how to train.
        padding: makes batches; packing fills rows with its token, too.
        seed: of the order of the data and of dropout.
        workdir: for checkpoints; of this training alone.
        on_event: hears of every step.
        identity: names what else decides the result (recipe, base model), so that no other's checkpoint is resumed.

    Raises:
        InvalidInput: no examples, or options that do not go with model, method or data.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        Conflict: another training is at work in `workdir`, or it holds checkpoints of another one.
        RegraftError: the loss is no number, the GPU's memory does not suffice, or the disk is full.
    """
    if not examples:
        raise InvalidInput("There is no example to train on.", "Look at the recipe's data and selection.")
    if options.validate_every and not validation:
        raise InvalidInput("training.validate_every is set, but there are no validation examples.", "Set data.sizes.")
    if options.processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise InvalidInput(
            f"training.processes is {options.processes}, but this is no such launch.", "Use train_recipe."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise InvalidInput(
            "ACCELERATE_USE_FSDP is set, which would split the adapter, too.",
            "Unset it; training.shard_base splits the base alone.",
        )
    device = next(adapted.model.parameters()).device
    run = _digest(adapted, examples, validation, options, seed, identity)
    collate: Collate = Packing(padding.pad, options.max_length) if options.packing else padding
    with (
        _as_it_was(adapted.model),
        _random_state_of_its_own(device),
        fused_layers(adapted, options.kernels),
        freed_memory_kept(device),
        nullcontext() if in_worker() else exclusive(workdir),
        awaited_interruption() as interruption,
    ):
        if options.packing:
            check_packing(
                adapted.model,
                lambda batch: objective(adapted.model, adapted.transform_batch(dict(batch))),
                examples,
                padding,
                collate,
            )
        quantised = QuantisedTraining(adapted.trainable(), options.adapter_bits) if options.adapter_bits else None
        if quantised:
            quantised.start(seed)
        checkpoints = Checkpoints(checkpoints_directory(workdir), run)
        found = checkpoints.newest()
        engine = Engine(
            adapted,
            objective,
            collate,
            examples,
            validation,
            _arguments(device, options, seed, checkpoints.root, bool(validation)),
            checkpoints=checkpoints,
            progress=Progress.stored(found.progress) if found else Progress(),
            early_stopping=options.early_stopping,
            interruption=interruption,
            on_event=on_event,
            quantised=quantised,
        )
        try:
            return _run(engine, found, total_steps(options, len(examples)))
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(" If reserved")[0]
            raise RegraftError(
                f"The GPU ran out of memory after step {engine.state.global_step}: {reason}",
                "Halve training.batch_size and double training.gradient_accumulation (the same updates), set "
                "training.gradient_checkpointing: true, or lower training.max_length.",
            ) from None
        finally:
            engine.accelerator.unwrap_model(adapted.model, keep_fp32_wrapper=False)  # autocast off again


def total_steps(options: TrainingOptions, examples: int) -> int:
    """How many optimiser updates a training on so many examples takes, should it not stop early."""
    batches = math.ceil(math.ceil(examples / options.batch_size) / options.processes)
    updates = math.ceil(batches / options.gradient_accumulation)
    return options.steps or math.ceil((options.epochs or DEFAULT_EPOCHS) * updates)


def _run(engine: Engine, found: Checkpoint | None, total: int) -> TrainingOutcome:
    progress, patience = engine.progress, engine.early_stopping

    def stopped_early() -> bool:
        return patience is not None and progress.bad_validations >= patience

    if found and (found.step >= total or stopped_early()):
        engine._load_from_checkpoint(str(found.directory))  # it had ended, and was killed before it could say so
    else:
        engine.model.train()
        engine.train(resume_from_checkpoint=str(found.directory) if found else None)
    steps = len(progress.losses)
    if engine.interruption.requested:
        raise Interrupted(
            f"The training was stopped after step {steps} of {total}; a checkpoint was written.",
            f"Run the same command again: it goes on after step {steps}.",
        )
    best_step = progress.best[0] if engine.best and progress.best else None
    if engine.best:
        engine.adapted.restore(engine.best)
    if engine.quantised:
        engine.quantised.settle()
    return TrainingOutcome(
        steps=steps,
        losses=tuple(progress.losses),
        validation_losses=tuple(progress.validation_losses),
        seconds=progress.seconds,
        labelled_tokens=progress.labelled_tokens,
        tokens=progress.tokens,
        stopped_early=stopped_early(),
        best_step=best_step,
        resumed_from=found.step if found else None,
        peak_memory_bytes=_peak_memory(engine.args.device),
    )


def _arguments(
    device: torch.device, options: TrainingOptions, seed: int, directory: Path, validates: bool
) -> TrainingArguments:
    on_cpu = device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=options.steps or -1,
        num_train_epochs=options.epochs or DEFAULT_EPOCHS,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type=_SCHEDULES[options.schedule],
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        activation_checkpointing=options.gradient_checkpointing,
        bf16=options.precision == "bfloat16" or (options.precision == "auto" and not on_cpu),
        eval_strategy="steps" if validates and options.validate_every else "no",
        eval_steps=options.validate_every,
        save_strategy="steps",
        save_steps=options.checkpoint_every,
        save_only_model=options.shard_base,  # the engine could not resume it by its own checkpoints; these are ours
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=seed,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and in_worker() else None,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
    )
    _ = arguments.device  # sets the number of GPUs, which must then be
    arguments._n_gpu = min(1, arguments.n_gpu)  # one a process: no DataParallel behind anybody's back
    return arguments


def _digest(
    adapted: Adapted,
    examples: Sequence[Encoded],
    validation: Sequence[Encoded],
    options: TrainingOptions,
    seed: int,
    identity: str,
) -> str:
    """Names everything that decides what the training makes."""
    told = [adapted.adapter_config(), options.model_dump(mode="json"), seed, identity]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for part in (examples, validation):
        digest.update(_fingerprint(part).encode())
    return digest.hexdigest()


def _fingerprint(examples: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.input_ids, example.labels)).encode())
    return digest.hexdigest()


def _calibration(examples: Sequence[Encoded], padding: Padding, size: int, seed: int) -> Iterator[Batch]:
    """Batches of the training data, in an order of their own."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(order), size):
        yield padding([examples[index] for index in order[start : start + size]])


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo what the engine sets on a model: training mode, no cache, gradient checkpointing."""
    was_training, config = model.training, getattr(model, "config", None)
    used_cache = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        model.train(was_training)
        if used_cache is not None:
            config.use_cache = used_cache  # type: ignore[union-attr]
        if getattr(model, "is_activation_checkpointing", False):
            model.activation_checkpointing_disable()  # type: ignore[operator]


@contextmanager
def _random_state_of_its_own(device: torch.device) -> Iterator[None]:
    """Leave the global generators, which the engine seeds, as they were found."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def in_worker() -> bool:
    """Whether this is one of the processes of a data-parallel launch."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
