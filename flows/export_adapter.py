"""Give a version to another tool, in that tool's format, with what it cost."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from infra.errors import InvalidInput, NotMergeable
from infra.files import require_free, whole_folder
from infra.settings import get_settings
from registry import AdapterRegistry
from serving.loading import LoadedAdapter, load
from training.adapter_files import write_adapter
from training.base_models import load_base
from training.compression.stored import is_compressed
from training.interchange import mlx
from training.interchange.as_lora import lora_layers, lora_layers_at, write_peft
from training.interchange.kohya import PREFIX, layers_to_kohya
from training.interchange.lora_layers import LoraLayers, fold, highest_rank
from training.interchange.merge_proof import MergeProof
from training.interchange.probes import Difference, answers, difference, probes
from training.interchange.truncation import Loss
from training.merged_model import SHARD_SIZE, shard_bytes, stored_dtype, write_merged_model
from training.methods.contract import CONFIG_FILE, written_config
from training.methods.peft_method import bare
from training.methods.plain_lora import write_plain_lora

Tool = Literal["peft", "kohya", "mlx", "merged", "stored"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        address: of the version.
        directory: that holds it.
        to: the format.
        rank: the highest of its layers, where it was written as a LoRA.
        loss: of the update, where it was cut down to a rank.
        difference: of the logits, where it was cut down to a rank and the base can be probed.
        proof: of a merged model.
    """

    address: str
    directory: Path
    to: Tool
    rank: int | None = None
    loss: Loss | None = None
    difference: Difference | None = None
    proof: MergeProof | None = None


def export_adapter(
    address: str,
    directory: Path,
    to: Tool = "peft",
    *,
    as_lora: bool = False,
    rank: int | None = None,
    dtype: str | None = None,
    shard_size: str = SHARD_SIZE,
) -> Exported:
    """Write a version into a new or empty folder.

    Args:
        address: NAME@VERSION or NAME@ALIAS.
        directory: new or empty.
        to: whose format; peft: a compressed version is decoded; stored: the files as the registry holds them.
        as_lora: for peft: as a plain LoRA, whatever the method; nothing is lost, or it is refused.
        rank: cut down to a LoRA of this rank, the loss measured.
        dtype: of a merged model; none given: that of the base's own files.
        shard_size: the most that one file of a merged model takes.

    Raises:
        InvalidInput: the adapter, or the format, cannot say it.
        NotMergeable: it does not merge, or the merge fails its proof.
        Conflict: the folder holds something.
    """
    shard_bytes(shard_size)  # before a base is loaded
    registry = AdapterRegistry()
    plain = to == "peft" and not as_lora and rank is None
    if to == "stored" or (plain and not is_compressed(written_config(registry.materialise(address)))):
        registry.export(address, directory)
        return Exported(address, directory, to)
    require_free(directory)  # before a base is loaded
    loaded = load(address)
    try:
        if to == "merged":
            chosen = DTYPES[dtype] if dtype else stored_dtype(loaded.base.directory)
            proof = write_merged_model(loaded.adapted, loaded.tokenizer, directory, dtype=chosen, shard_size=shard_size)
            return Exported(address, directory, to, proof=proof)
        if rank is not None:
            layers, loss = lora_layers_at(loaded.adapted, rank)
            moved = _moved(loaded, layers)
            _write(layers, loaded, directory, to)
            return Exported(address, directory, to, rank, loss, moved)
        if plain:
            _write_decoded(loaded, directory)
            return Exported(address, directory, to)
        if to == "peft":
            with whole_folder(directory) as written:
                write_plain_lora(loaded.adapted, written)
            return Exported(address, directory, to)
        layers = lora_layers(loaded.adapted)
        _write(layers, loaded, directory, to)
        return Exported(address, directory, to, highest_rank(layers.values()))
    except (InvalidInput, NotMergeable) as error:  # which know the adapter by its name on the model, or not at all
        here = f"{loaded.version.address} ({loaded.version.method})"
        what = error.what.replace(f"Adapter '{loaded.adapted.name}'", here)
        raise type(error)(what if here in what else f"{here}: {what}", error.remedy) from None


def _write_decoded(loaded: LoadedAdapter, directory: Path) -> None:
    """A compressed version as it would be without the compression."""
    version = loaded.version
    write_adapter(
        directory,
        loaded.adapted.save,
        method_name=version.method,
        base_identity=version.base.identity_sha256,
        base_reference=version.base.reference,
        recipe=version.recipe,
        metrics=version.metrics,
    )


def _write(layers: LoraLayers, loaded: LoadedAdapter, directory: Path, to: Tool) -> None:
    model = bare(loaded.adapted.model)
    with whole_folder(directory) as written:
        if to == "peft":
            write_peft(layers, model, written)
            return
        written.mkdir()
        if to == "mlx":
            config, tensors = mlx.layers_to_mlx(layers, model)
            save_file(tensors, written / mlx.TENSORS_FILE, metadata={"format": "mlx"})
            content = json.dumps(config, indent=4, sort_keys=True)
            (written / CONFIG_FILE).write_text(content + "\n", encoding="utf-8")
        else:
            tensors = layers_to_kohya(layers, PREFIX)
            said = {"ss_network_module": "networks.lora", "ss_network_dim": str(highest_rank(layers.values()))}
            save_file(tensors, written / f"{loaded.version.adapter}.safetensors", metadata={"format": "pt", **said})


def _moved(loaded: LoadedAdapter, layers: LoraLayers) -> Difference | None:
    """How far the cut-down adapter answers from the whole one; None where the base cannot be probed."""
    try:
        inputs = probes(bare(loaded.adapted.model), loaded.tokenizer)
    except InvalidInput:
        return None
    before = answers(loaded.model, inputs)
    parameter = next(loaded.model.parameters())
    again = load_base(
        loaded.base.reference, cache=get_settings().base_models, dtype=parameter.dtype, device=parameter.device
    ).model
    fold(layers, again)
    return difference(before, answers(again, inputs))
