"""Will this adapter serve? What each server asks of a peft folder, read off its config and its tensors' headers.

Sources, as of late 2026:
    vLLM        docs.vllm.ai, features/lora; vllm/lora/peft_helper.py, vllm/config/lora.py (the ranks that
                --max-lora-rank takes), vllm/lora/lora_model.py, vllm/lora/layers/logits_processor.py
    LoRAX       docs/models/adapters/lora.md (modules by architecture); server/lorax_server/adapters/lora.py and
                utils/punica.py (ranks are padded, and the padded rank divides the α of the modules that follow)
    peft        src/peft/utils/peft_types.py of 0.21
    llama.cpp   convert_lora_to_gguf.py; src/llama-adapter.h (scale = α / the tensor's own rank)
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isclose, sqrt
from pathlib import Path
from shlex import quote
from typing import Literal

from infra.errors import CorruptArtifact
from registry.adapter_directory import AdapterFiles
from registry.safetensors_header import strict_json_object

Server = Literal["vllm", "lorax", "peft", "llama.cpp"]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
VLLM_LARGEST_VOCABULARY = 258_048
LORAX_MODULES = {
    "llama": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head",
    "mistral": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head",
    "mixtral": "q_proj k_proj v_proj o_proj lm_head",
    "gemma": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "gemma2": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "phi3": "qkv_proj o_proj gate_up_proj down_proj lm_head",
    "phi": "q_proj k_proj v_proj dense fc1 fc2 lm_head",
    "qwen2": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head",
    "qwen": "c_attn c_proj w1 w2 lm_head",
    "cohere": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head",
    "dbrx": "Wqkv out_proj lm_head",
    "gpt2": "c_attn c_proj c_fc",
    "bloom": "query_key_value dense dense_h_to_4h dense_4h_to_h lm_head",
}
_PEFT_TYPES = (
    "ADALORA ADAMSS ADAPTION_PROMPT BEFT BOFT C3A CARTRIDGE CPT DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA "
    "HRA IA3 LILY LN_TUNING LOHA LOKR LORA MISS MULTITASK_PROMPT_TUNING OFT OSF PEANUT POLY PREFIX_TUNING "
    "PROMPT_TUNING PSOFT PVERA P_TUNING RANDLORA ROAD SHADOW SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS "
    "UNILORA VBLORA VERA WAVEFT XLORA "
)
PEFT_TYPES = frozenset(_PEFT_TYPES.split())
COMPRESSED = "COMPRESSED"  # Regraft's own; what it was before stands inside
_SIDE = re.compile(r"(?:base_model\.model\.)?(?P<place>.+)\.lora_(?P<side>[AB])\.weight")
_LAYER = re.compile(r"(?P<before>.*\.)?(?P<number>\d+)\.(?P<inside>.+)")
_NO_CHANGE_OF_WEIGHTS = {"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"}
_TRAINED_BASE = {"REGRAFT_FULL", "REGRAFT_LISA", "REGRAFT_GALORE", "REGRAFT_NATURAL_GALORE", "LN_TUNING"}
_LARGEST = 1e19  # of a rank or α; its square is beyond float32
_FLOATS = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class Line:
    """One line of the report: what is asked, what was found, and what to do where that is not enough."""

    passed: bool
    name: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Subject:
    """The adapter under examination.

    Args:
        called: what the user calls it, an address or a folder's path, for the remedies' commands.
        files: its folder, checked.
        family: `model_type` of its base, where it is known.
        tied_head: whether the base's head is tied to its embeddings, where it is known.
    """

    called: str
    files: AdapterFiles
    family: str | None = None
    tied_head: bool | None = None

    @property
    def kind(self) -> str:
        """peft's word for its type."""
        return str(self.files.config.get("peft_type"))

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer with a pair of factors, by the layer's name, as the tensors have it."""
        found = ((_SIDE.fullmatch(name), shape) for name, (_, shape) in self.files.tensors.items())
        return {match["place"]: shape[0] for match, shape in found if match and match["side"] == "A" and shape}

    @cached_property
    def others(self) -> list[str]:
        """Tensors that are no factor of a LoRA."""
        return sorted(name for name in self.files.tensors if not _SIDE.fullmatch(name))

    @property
    def rank(self) -> int:
        """The highest of its ranks."""
        return max(self.ranks.values(), default=0)

    def scales(self) -> dict[str, float]:
        """α/r, or α/√r, of every layer, patterns and rsLoRA honoured as peft does."""
        config, told = self.files.config, {}
        for place, rank in self.ranks.items():
            alpha = _number(_of(config.get("alpha_pattern"), place, config.get("lora_alpha")))
            told[place] = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
        return told

    @property
    def export(self) -> str:
        """The command that exports it; a folder is registered before."""
        if self.is_folder:
            return f"{self.imported}, then regraft export NAME DIR"
        return f"regraft export {self.called} DIR"

    @property
    def imported(self) -> str:
        """The command that registers the folder."""
        return f"regraft import {quote(self.called)} NAME --base BASE"

    @property
    def is_folder(self) -> bool:
        """Whether it is called by a path, which no address is."""
        return "/" in self.called

    def cut(self, rank: int | None = None) -> str:
        """The command that writes it as one plain LoRA, of its own highest rank where none is given."""
        return f"{self.export} --rank {rank or self.rank}"

    @property
    def merged(self) -> str:
        """The command that writes it as a plain model."""
        return f"{self.export} --to merged"


def examine(subject: Subject, server: Server, max_rank: int | None = None) -> list[Line]:
    """Every rule of the server, in the order in which it would stumble.

    Args:
        subject: the adapter.
        server: that shall serve it.
        max_rank: the highest rank that this server was started for; none given: its default.

    Raises:
        CorruptArtifact: a config whose ranks or alphas are no numbers.
    """
    if server == "peft":
        return [_known_to_peft(subject), *_readable(subject)]
    if subject.kind != "LORA":
        return [_not_a_lora(subject, server)]
    return [rule for rules in _RULES[server] for rule in rules(subject, max_rank)]


def tied_head(reference: str) -> bool | None:
    """Whether a base's head is tied, by its config; None where that is not at hand or does not say."""
    config = Path(reference.removeprefix("path:")) / "config.json"
    if not reference.startswith("path:") or not config.is_file():
        return None
    try:
        tied = strict_json_object(config.read_bytes()).get("tie_word_embeddings")
    except ValueError:
        return None
    return tied if isinstance(tied, bool) else None


def _not_a_lora(subject: Subject, server: Server) -> Line:
    found = f"stored as {subject.kind}, which {server} does not know"
    if subject.kind == COMPRESSED:
        return Line(False, "a LoRA", found, f"It is decoded on the way out: {subject.export}")
    if subject.kind in _NO_CHANGE_OF_WEIGHTS:
        return Line(False, "a LoRA", found, f"It is no change of weights: {_generate(subject)}, or peft")
    return Line(False, "a LoRA", found, _as_lora(subject))


def _as_lora(subject: Subject) -> str:
    if subject.kind in _TRAINED_BASE:  # norms and embeddings, too, which no LoRA can say
        return f"{subject.merged}; or a LoRA out of that: regraft import DIR NAME --base BASE --rank 16"
    refused = "where that is refused, --rank 16 tells what is lost"
    return f"{subject.export} --as-lora; {refused}; or {subject.merged}"


def _generate(subject: Subject) -> str:
    if subject.is_folder:
        return f"{subject.imported}, then regraft generate NAME"
    return f"regraft generate {subject.called}"


def _known_to_peft(subject: Subject) -> Line:
    if subject.kind in PEFT_TYPES:
        return Line(True, "a type of peft's", subject.kind)
    if subject.kind == COMPRESSED:
        return _not_a_lora(subject, "peft")
    return Line(False, "a type of peft's", f"{subject.kind} is Regraft's own", _as_lora(subject))


def _readable(subject: Subject) -> list[Line]:
    dtypes = {dtype for dtype, _ in subject.files.tensors.values()}
    return [Line(True, "dtype", ", ".join(sorted(dtypes))), *_no_tokens(subject)] if subject.kind in PEFT_TYPES else []


# -- rules that several servers share; each gives its lines ------------------------------------------------------------


def _is_lora(subject: Subject, max_rank: int | None) -> list[Line]:
    del max_rank
    return [Line(True, "a LoRA", f"{len(subject.ranks)} layers")]


def _no_dora(subject: Subject, max_rank: int | None) -> list[Line]:
    del max_rank
    is_dora = bool(subject.files.config.get("use_dora")) or any("magnitude" in name for name in subject.others)
    remedy = f"{subject.cut()}, which tells what that loses; or {subject.merged}"
    return [Line(not is_dora, "no DoRA", "use_dora" if is_dora else "none", remedy if is_dora else "")]


def _no_whole_modules(subject: Subject, max_rank: int | None) -> list[Line]:
    del max_rank
    named = subject.files.config.get("modules_to_save") or []
    whole = [str(name) for name in named] if isinstance(named, list) else [str(named)]
    if not whole:  # the config may forget what the file holds
        whole = [name for name in subject.others if "lora_" not in name and not name.endswith(".bias")]
    return [_absent("no whole modules", whole, f"It trains more than a LoRA: {subject.merged}")]


def _no_bias(subject: Subject, max_rank: int | None) -> list[Line]:
    del max_rank
    told = subject.files.config.get("bias", "none")
    biases = [name for name in subject.others if name.endswith(".bias")]
    if told not in (None, "none"):
        biases = [f"bias: {told}", *biases]
    return [_absent("no biases", biases, subject.merged)]


def _no_tokens(subject: Subject, max_rank: int | None = None) -> list[Line]:
    del max_rank
    added = [name for name in subject.others if name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight"))]
    if subject.files.config.get("trainable_token_indices"):
        added.append("trainable_token_indices")
    if "added_tokens.json" in subject.files.files:
        added.append("added_tokens.json")
    return [_absent("no tokens added", added, f"The server has the base's vocabulary only: {subject.merged}")]


def _dtype(subject: Subject, max_rank: int | None) -> list[Line]:
    del max_rank
    dtypes = sorted({dtype for dtype, _ in subject.files.tensors.values()})
    passed = set(dtypes) <= _FLOATS
    remedy = "" if passed else f"{subject.cut()} writes float32"
    return [Line(passed, "dtype", ", ".join(dtypes) + (" (cast to the server's)" if passed else ""), remedy)]


def _one_scale(subject: Subject, max_rank: int | None) -> list[Line]:
    """vLLM and LoRAX compute one scale from r and lora_alpha, and read no pattern."""
    del max_rank
    config = subject.files.config
    rank = _number(config.get("r"))
    scale = _number(config.get("lora_alpha")) / (sqrt(rank) if config.get("use_rslora") else rank)
    return [_same_scales(subject, dict.fromkeys(subject.ranks, scale))]


def _same_scales(subject: Subject, theirs: Mapping[str, float]) -> Line:
    other = [place for place, scale in subject.scales().items() if not isclose(scale, theirs[place], rel_tol=1e-6)]
    if not other:
        return Line(True, "scale", "read as it was trained")
    first = other[0]
    found = f"{first} would get {theirs[first]:.4g} instead of {subject.scales()[first]:.4g}{_more(other)}"
    return Line(False, "scale", found, f"{subject.cut()}: one rank and scale for all, nothing lost")


def _absent(name: str, found: list[str], remedy: str) -> Line:
    return Line(not found, name, f"{found[0]}{_more(found)}" if found else "none", remedy if found else "")


# -- vLLM --------------------------------------------------------------------------------------------------------------


def _vllm_rank(subject: Subject, max_rank: int | None) -> list[Line]:
    limit = max_rank or VLLM_DEFAULT_RANK
    highest = max(subject.rank, int(_number(subject.files.config.get("r"))))
    found = f"{highest}; {'the server takes' if max_rank else 'by default it takes'} {limit}"
    if highest <= limit:
        return [Line(True, "rank", found)]
    enough = next((rank for rank in VLLM_RANKS if rank >= highest), None)
    started = f"start vLLM with --max-lora-rank {enough}, or " if enough else ""
    return [Line(False, "rank", found, f"{started}{subject.cut(limit)}, which tells what that loses")]


def _vllm_modules(subject: Subject, max_rank: int | None) -> list[Line]:
    del max_rank
    embeddings = [name for name in subject.others if "lora_embedding" in name]
    lines = [_absent("linear layers only", embeddings, subject.merged)]
    heads = [n for n in subject.files.tensors if n.endswith("lm_head.lora_B.weight")]
    for vocabulary in (subject.files.tensors[name][1][0] for name in heads):
        passed = vocabulary <= VLLM_LARGEST_VOCABULARY
        found = f"{vocabulary:,} tokens; with an adapted head it takes {VLLM_LARGEST_VOCABULARY:,}"
        lines.append(Line(passed, "vocabulary", found, "" if passed else subject.merged))
    return lines


# -- LoRAX -------------------------------------------------------------------------------------------------------------


def _lorax_rank(subject: Subject, max_rank: int | None) -> list[Line]:
    wrong = sorted({rank for rank in subject.ranks.values() if rank != 8 and rank % 16})
    highest = f"{subject.rank}; the server takes {max_rank}" if max_rank else str(subject.rank)
    lines = []
    if max_rank is not None and subject.rank > max_rank:
        lines.append(Line(False, "rank", highest, f"{subject.cut(max_rank)}, which tells what that loses"))
    if wrong or len(set(subject.ranks.values())) > 1:
        padded = 8 if subject.rank <= 8 else -(-subject.rank // 16) * 16
        found = f"{', '.join(map(str, sorted(set(subject.ranks.values()))))}: padded to 8 or a multiple of 16, unscaled"
        lines.append(Line(False, "rank is 8 or a multiple of 16", found, f"{subject.cut(padded)}: nothing is lost"))
    return lines or [Line(True, "rank", highest)]


def _lorax_modules(subject: Subject, max_rank: int | None) -> list[Line]:
    del max_rank
    known = LORAX_MODULES.get(subject.family or "")
    kinds = sorted({place.rpartition(".")[2] for place in subject.ranks})
    if known is None:
        found = f"{', '.join(kinds)}; its page has no list for {subject.family or 'this base'}"
        return [Line(True, "modules", found)]
    strange = [kind for kind in kinds if kind not in known.split()]
    return [_absent("modules", strange, f"They would be ignored: {subject.merged}")]


def _lorax_every_layer(subject: Subject, max_rank: int | None) -> list[Line]:
    """A kind of module that one of the layers lacks is dropped in all of them."""
    del max_rank
    numbers: dict[str, set[int]] = {}
    for place in subject.ranks:
        if match := _LAYER.fullmatch(place):
            numbers.setdefault(match["inside"], set()).add(int(match["number"]))
    highest = max((max(found) for found in numbers.values()), default=-1)
    partial = sorted(kind for kind, found in numbers.items() if found != set(range(highest + 1)))
    found = f"0 to {highest}" if numbers else "none"
    if partial:
        found = f"{partial[0]} in {len(numbers[partial[0]])} of {highest + 1} at least{_more(partial)}"
    remedy = f"LoRAX drops a module that one layer lacks: {subject.merged}"
    return [Line(not partial, "every layer adapted", found, remedy if partial else "")]


# -- llama.cpp ---------------------------------------------------------------------------------------------------------


def _llama_scale(subject: Subject, max_rank: int | None) -> list[Line]:
    del max_rank
    alpha = _number(subject.files.config.get("lora_alpha"))
    return [_same_scales(subject, {place: alpha / rank for place, rank in subject.ranks.items()})]


def _llama_rank(subject: Subject, max_rank: int | None) -> list[Line]:
    if max_rank is None or subject.rank <= max_rank:
        return [Line(True, "rank", f"{subject.rank}; any is taken")]
    remedy = f"{subject.cut(max_rank)}, which tells what that loses"
    return [Line(False, "rank", f"{subject.rank}; {max_rank} are asked for", remedy)]


def _llama_tensors(subject: Subject, max_rank: int | None) -> list[Line]:
    """What the converter stops at: any tensor but factors and norms."""
    del max_rank
    taken = ("lora_embedding", "_layernorm", ".norm", "magnitude")  # the last has a line of its own
    strange = [name for name in subject.others if not any(part in name for part in taken)]
    lines = [_absent("factors and norms only", strange, subject.merged)]
    if any(place.rpartition(".")[2] == "lm_head" for place in subject.ranks):
        told = {True: "tied to the embeddings", False: "not tied", None: "the base was not asked whether it is tied"}
        passed = subject.tied_head is not True
        lines.append(Line(passed, "the head", told[subject.tied_head], "" if passed else subject.merged))
    return lines


_Rule = Callable[[Subject, int | None], Iterable[Line]]
_RULES: Mapping[str, tuple[_Rule, ...]] = {
    "vllm": (
        _is_lora, _vllm_rank, _one_scale, _no_dora, _no_whole_modules, _no_bias, _vllm_modules, _no_tokens, _dtype,
    ),
    "lorax": (
        _is_lora, _lorax_rank, _one_scale, _no_dora, _no_whole_modules, _no_bias, _lorax_modules, _lorax_every_layer,
        _no_tokens, _dtype,
    ),
    "llama.cpp": (_is_lora, _llama_rank, _llama_scale, _no_dora, _llama_tensors, _no_tokens, _dtype),
}  # fmt: skip


def _of(pattern: object, place: str, default: object) -> object:
    """What a pattern of peft says of a layer: its keys are ends of names, or regular expressions for them."""
    if not isinstance(pattern, dict):
        return default
    try:
        return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", place)), default)
    except re.error as error:
        raise CorruptArtifact(
            f"alpha_pattern in its config is no pattern ({error}).", "Save the adapter again."
        ) from None


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
        raise CorruptArtifact(f"Its config says r or lora_alpha {value!r:.40}.", "Save the adapter again.")
    return float(value)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
