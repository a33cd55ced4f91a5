"""How an adapter is compressed, in one line: `low_rank:rank=4+groups:bits=4`, `compeft:density=0.05,alpha=2`.

A LoRA may first be cut to a lower rank; a codec, which comes last, makes bytes of the tensors.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator
from torch import Tensor

from infra.documents import Section, did_you_mean, parse, told
from infra.errors import CorruptArtifact, InvalidInput
from training.compression import container
from training.compression.codebook import Codebook
from training.compression.codec import COMPRESSIBLE, Codec, Origin, encode
from training.compression.compeft import ComPEFT, ComPEFTOptions
from training.compression.container import REMEDY
from training.compression.groups import Groups

CODECS: dict[str, Codec[Any]] = {codec.name: codec for codec in (ComPEFT(), Codebook(), Groups())}
LOW_RANK = "low_rank"
EXAMPLE = "For example: low_rank:rank=4+groups:bits=4"
FORMS = "Forms: compeft:density=0.1, codebook:bits=2, groups:bits=4; of a LoRA also low_rank:rank=4+ before them."


class LowRankOptions(Section):
    """How low; one of the two."""

    rank: int | None = Field(None, ge=1, description="of every layer; a layer of no higher rank is left as it is")
    energy: float | None = Field(
        None, gt=0, le=1, description="each layer gets the least rank that keeps so much of its squared singular values"
    )

    @model_validator(mode="after")
    def _one_of_the_two(self) -> "LowRankOptions":
        if (self.rank is None) == (self.energy is None):
            raise ValueError("give either rank or energy")
        return self


@dataclass(frozen=True)
class Steps:
    """What is done.

    Args:
        line: that names it.
        cut: the rank that a LoRA is cut to before, if any.
        codec: its name.
        options: of the codec.
    """

    line: str
    cut: LowRankOptions | None
    codec: str
    options: Section

    @property
    def open_alpha(self) -> bool:
        """Whether it is ComPEFT without a word on α, which then is to be chosen by what it does."""
        return isinstance(self.options, ComPEFTOptions) and "alpha" not in self.options.model_fields_set

    def with_alpha(self, alpha: float) -> "Steps":
        """The same with an α."""
        return read_steps(f"{self.line}{',' if ':' in self.line.rpartition('+')[2] else ':'}alpha={alpha:g}")


def read_steps(line: str) -> Steps:
    """The steps that a line names: NAME or NAME:KEY=VALUE,… each, joined by +.

    Raises:
        InvalidInput: an unknown name or key, a wrong value, or steps in an order that cannot be.
    """
    *before, last = [_read(part.strip(), line) for part in line.split("+")]
    for name, _ in before:
        if name != LOW_RANK:
            raise InvalidInput(f"{line!r}: {name} makes bytes, so nothing can follow it.", EXAMPLE)
    if last[0] not in CODECS:
        raise InvalidInput(
            f"{line!r} ends with {last[0]}, which makes no bytes.",
            f"Add one of {', '.join(sorted(CODECS))}. {EXAMPLE}",
        )
    if len(before) > 1:
        raise InvalidInput(f"{line!r} cuts the rank twice.", EXAMPLE)
    cut = next((options for _, options in before if isinstance(options, LowRankOptions)), None)
    return Steps(line, cut, *last)


def _read(part: str, line: str) -> tuple[str, Section]:
    name, _, rest = part.partition(":")
    known: dict[str, type[Section]] = {name: codec.options_type for name, codec in CODECS.items()}
    known[LOW_RANK] = LowRankOptions
    if name not in known:
        raise InvalidInput(f"{line!r}: there is no step {name!r}. {did_you_mean(name, list(known))}", FORMS)
    given: dict[str, Any] = {}
    for pair in rest.split(",") if rest else []:
        key, equals, value = (word.strip() for word in pair.partition("="))
        if not equals or not key or not value or key in given:
            raise InvalidInput(f"{line!r}: {pair!r} is not one KEY=VALUE more of {name}.", EXAMPLE)
        given[key] = _number(value)
    return name, parse(known[name], given, repr(line), name, FORMS)


def _number(value: str) -> int | str:
    """A whole number as one, so that it can be one of a few; all else is left to the options."""
    return int(value) if value.isdecimal() and value.isascii() and len(value) < 10 else value


def compress(
    tensors: Mapping[str, Tensor],
    steps: Steps | str,
    dense: Collection[str] = (),
    origins: Mapping[str, Origin] | None = None,
) -> bytes:
    """The file of `tensors`, by the codec of the steps; `adapter.compressed` goes all of them.

    Args:
        tensors: by name.
        steps: or the line that names them.
        dense: names of tensors that go in as they are.
        origins: what tensors are measured from; 0 where there is none.

    Raises:
        InvalidInput: see `read_steps` and `codec.encode`.
    """
    if isinstance(steps, str):
        steps = read_steps(steps)
    return encode(tensors, CODECS[steps.codec], steps.options, dense, origins)


def decompress(data: bytes, origins: Mapping[str, Origin] | None = None) -> dict[str, Tensor]:
    """The tensors of a compressed file, on the CPU, in the order of their names.

    Args:
        data: the file.
        origins: the tensors, by name, from which those of the file are measured; numbers are in the file itself.

    Raises:
        CorruptArtifact: the file is damaged, or was made to do damage; no memory was taken that it does not justify.
        InvalidInput: an origin is missing, or another one.
    """
    held = container.read(data)
    if held.codec not in CODECS:
        raise CorruptArtifact(f"The compressed adapter is of the unknown codec {held.codec!r:.100}.", REMEDY)
    codec = CODECS[held.codec]
    try:
        options = codec.options_type.model_validate(held.options)
    except ValueError as error:
        raise CorruptArtifact(f"The options of the compressed adapter are not sound: {told(error)}.", REMEDY) from None
    result = {}
    for packed in held.tensors:
        if packed.details is None:
            result[packed.name] = container.restored(packed)
            continue
        if packed.dtype not in COMPRESSIBLE:
            raise CorruptArtifact(f"{packed.name} cannot have been compressed: it is of {packed.dtype}.", REMEDY)
        result[packed.name] = codec.unpack(packed, options, (origins or {}).get(packed.name))
    return result
