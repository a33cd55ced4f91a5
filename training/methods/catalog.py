"""The method catalogue. Adding a method is one file that defines `METHOD`, one line here, one test parameter.

Where one module holds several methods, the line says which: `module:OBJECT`.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from infra.documents import did_you_mean
from infra.errors import NotFound

if TYPE_CHECKING:
    from training.methods.contract import Method

CATALOG: dict[str, str] = {
    "lora": "training.methods.lora",
    "rslora": "training.methods.rslora",
    "dora": "training.methods.dora",
    "pissa": "training.methods.pissa",
    "s2ft": "training.methods.s2ft",
    "paca": "training.methods.paca",
    "ist": "training.methods.ist",
    "corda": "training.methods.corda",
    "eva": "training.methods.eva",
    "lora-ga": "training.methods.lora_ga",
    "lora-xs": "training.methods.lora_xs",
    "lora-sb": "training.methods.lora_sb",
    "loldu": "training.methods.loldu",
    "hydra": "training.methods.hydra",
    "llm-adapters": "training.methods.llm_adapters",
    "small-models-lrl": "training.methods.small_models_lrl",
    "compacter": "training.methods.compacter",
    "vera": "training.methods.from_peft:VERA",
    "loha": "training.methods.from_peft:LOHA",
    "lokr": "training.methods.from_peft:LOKR",
    "oft": "training.methods.from_peft:OFT",
    "boft": "training.methods.from_peft:BOFT",
    "fourierft": "training.methods.from_peft:FOURIERFT",
    "waveft": "training.methods.from_peft:WAVEFT",
    "hra": "training.methods.from_peft:HRA",
    "miss": "training.methods.from_peft:MISS",
    "randlora": "training.methods.from_peft:RANDLORA",
    "vb-lora": "training.methods.from_peft:VB_LORA",
    "c3a": "training.methods.from_peft:C3A",
    "road": "training.methods.from_peft:ROAD",
    "hira": "training.methods.from_peft:HIRA",
    "delora": "training.methods.from_peft:DELORA",
    "gralora": "training.methods.from_peft:GRALORA",
    "shira": "training.methods.from_peft:SHIRA",
    "adalora": "training.methods.adalora",
    "ln-tuning": "training.methods.ln_tuning",
    "ssf": "training.methods.ssf",
    "ia3": "training.methods.ia3",
    "prompt-tuning": "training.methods.prompt_tuning",
    "cpt": "training.methods.cpt",
    "prefix-tuning": "training.methods.prefix_tuning",
    "scaling-sft": "training.methods.scaling_sft",
    "composable-sft": "training.methods.composable_sft",
    "full": "training.methods.full",
    "lisa": "training.methods.lisa",
    "galore": "training.methods.galore",
    "natural-galore": "training.methods.natural_galore",
}


@cache
def get_method(name: str) -> "Method[Any]":
    """The method called `name`, imported when first asked for.

    Raises:
        NotFound: no such method; suggests the closest name.
    """
    if name not in CATALOG:
        raise NotFound(f"'{name}' is not a method. {did_you_mean(name, list(CATALOG))}", "See: regraft methods list")
    module, _, held = CATALOG[name].partition(":")
    method: Method[Any] = getattr(import_module(module), held or "METHOD")
    return method
