"""Take over an adapter in whatever format another tool wrote it."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from flows.base_models import find_base
from flows.import_adapter import import_adapter
from infra.errors import BaseModelMismatch, InvalidInput, RegraftError
from infra.settings import get_settings
from registry.addresses import adapter_name
from registry.records import VersionRecord
from registry.safetensors_header import read_header
from training.base_models import BaseFolder, load_base, resolve_base, skeleton
from training.interchange import mlx
from training.interchange.as_lora import write_peft
from training.interchange.diffusers_file import layers_from_diffusers
from training.interchange.extraction import extracted, require_floats
from training.interchange.formats import Format, read_config, recognise
from training.interchange.kohya import layers_from_kohya
from training.interchange.legacy_pickle import convert_pickle
from training.interchange.lora_layers import LoraLayer, LoraLayers, fold, require_finite
from training.interchange.mlx import layers_from_mlx
from training.interchange.probes import Difference, answers, difference, probes
from training.interchange.truncation import Keep, Loss
from training.merged_model import stored_dtype
from training.methods.contract import CONFIG_FILE
from training.tasks.catalog import get_task

LEAST_AGREEMENT = 0.25  # of the choices that a model and the LoRA extracted from it make; another base leaves next to 0


@dataclass(frozen=True)
class Imported:
    """What an import found and registered.

    Attributes:
        version: the new one.
        found: the format, in words.
        layers: adapted by it, where it was converted.
        rank: the highest of them.
        loss: of a LoRA extracted from a whole model.
        difference: of its logits from that model's, where it can be probed.
    """

    version: VersionRecord
    found: str
    layers: int | None = None
    rank: int | None = None
    loss: Loss | None = None
    difference: Difference | None = None


def import_foreign(
    path: Path,
    name: str,
    base: str,
    task: str | None = None,
    *,
    keep: Keep | None = None,
    part: str | None = None,
) -> Imported:
    """Register what another tool wrote as the next version of `name`; the format is told by the files themselves.

    Everything but a peft folder is converted to one in a temporary place first. Nothing is trusted until checked.

    Args:
        path: a folder or a file.
        name: of the adapter.
        base: the base model it was trained on, by registered name or reference.
        task: the built-in one that it is for.
        keep: how much of a whole model's difference to keep.
        part: of the pipeline, where a kohya or diffusers file holds several.

    Raises:
        NotFound: no such file, base or task.
        InvalidInput: no format that is known, options that do not go with it, or what a LoRA cannot say.
        BaseModelMismatch: it was made for another base model.
        CorruptArtifact: damaged, or not to be trusted.
    """
    adapter_name(name)
    if task is not None:
        get_task(task)
    record, folder = find_base(base)
    found, place = recognise(path)
    _check_options(found, keep, part)
    if found is Format.PEFT:
        return Imported(import_adapter(place, name, record.name, task), found)
    with TemporaryDirectory(prefix="regraft-import-") as staging:
        converted = Path(staging) / path.resolve().name  # the record says by this name where it came from
        layers: LoraLayers = {}
        loss, moved = None, None
        try:
            if found is Format.PEFT_PICKLE:
                convert_pickle(place, converted)
            elif found is Format.MODEL:
                assert keep is not None
                layers, loss, moved = _of_model(place, folder, keep)
            else:
                layers = _of_file(found, place, folder, part)
            if layers:
                write_peft(layers, skeleton(folder), converted)
            version = import_adapter(converted, name, record.name, task)
        except RegraftError as error:
            what = error.what.replace(str(converted), str(path))
            raise type(error)(what if str(path) in what else f"{path} ({found}): {what}", error.remedy) from None
    rank = max((layer.rank for layer in layers.values()), default=None)
    return Imported(version, found, len(layers) or None, rank, loss, moved)


def _check_options(found: Format, keep: Keep | None, part: str | None) -> None:
    if (found is Format.MODEL) != (keep is not None):
        raise (
            InvalidInput(
                "A whole model is not an adapter; one is extracted from it, at a rank.",
                "Give --rank 16, or --energy 0.99 for as many as that takes.",
            )
            if keep is None
            else InvalidInput(f"--rank and --energy are for whole models; this is {found}.", "Leave them out.")
        )
    if part is not None and found not in (Format.KOHYA, Format.DIFFUSERS):
        raise InvalidInput(f"--part is for kohya and diffusers files; this is {found}.", "Leave it out.")


def _of_file(found: Format, place: Path, base: BaseFolder, part: str | None) -> dict[str, LoraLayer]:
    model = skeleton(base)
    if found is Format.MLX:
        return layers_from_mlx(read_config(place / CONFIG_FILE), _tensors(place / mlx.TENSORS_FILE), model)
    tensors = _tensors(place)
    if found is Format.KOHYA:
        return layers_from_kohya(tensors, model, part)
    with safe_open(place, framework="pt") as opened:
        metadata = opened.metadata() or {}
    return layers_from_diffusers(metadata, tensors, model, part)


def _tensors(file: Path) -> dict[str, Tensor]:
    read_header(file)  # stricter than the library about what it opens
    tensors: dict[str, Tensor] = load_file(file)
    require_finite(tensors)
    return tensors


def _of_model(place: Path, base: BaseFolder, keep: Keep) -> tuple[LoraLayers, Loss, Difference | None]:
    cache = get_settings().base_models
    require_floats(resolve_base(f"path:{place.resolve()}", cache))
    tuned = load_base(f"path:{place.resolve()}", cache=cache)
    plain = load_base(base.reference, cache=cache)
    layers, loss = extracted(plain.model, tuned.model, keep, stored_dtype(place))
    try:
        inputs = probes(tuned.model, plain.tokenizer)
    except InvalidInput:
        return layers, loss, None
    whole = answers(tuned.model, inputs)
    fold(layers, plain.model)
    moved = difference(whole, answers(plain.model, inputs))
    if moved.top1 < LEAST_AGREEMENT:
        raise BaseModelMismatch(
            f"The extracted LoRA chooses what the model does at {moved.top1:.1%} of {moved.positions} positions, and "
            f"lacks {loss.total:.0%} of the update: it is not that model.",
            "Was it made from another base? If not, keep more of it: a higher --rank, or --energy 0.99.",
        )
    return layers, loss, moved
