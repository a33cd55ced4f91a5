"""The method catalogue. Adding a method is one file that defines `METHOD`, one line here, one test parameter."""

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
    "ia3": "training.methods.ia3",
    "prompt-tuning": "training.methods.prompt_tuning",
    "prefix-tuning": "training.methods.prefix_tuning",
    "scaling-sft": "training.methods.scaling_sft",
    "composable-sft": "training.methods.composable_sft",
    "full": "training.methods.full",
}


@cache
def get_method(name: str) -> "Method[Any]":
    """The method called `name`, imported when first asked for.

    Raises:
        NotFound: no such method; suggests the closest name.
    """
    if name not in CATALOG:
        raise NotFound(f"'{name}' is not a method. {did_you_mean(name, list(CATALOG))}", "See: regraft methods list")
    method: Method[Any] = import_module(CATALOG[name]).METHOD
    return method
