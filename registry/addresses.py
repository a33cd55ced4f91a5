"""Names and addresses: `counting@3`, `counting@production`, `counting`."""

import re
from dataclasses import dataclass

from infra.errors import InvalidInput

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_ALIAS = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_RESERVED_ALIAS = re.compile(r"v?\d+|latest")  # MLflow keeps `v3` and `latest` for itself; digits are version numbers
_HOW = "lower-case letters, digits, '.', '_' and '-', starting with a letter or digit, at most 63 characters"


def adapter_name(text: str) -> str:
    """`text`, if it can name an adapter (or a base model).

    Raises:
        InvalidInput: it cannot.
    """
    if not _NAME.fullmatch(text):
        raise InvalidInput(f"{text!r} cannot be a name.", f"A name is {_HOW}.")
    return text


def alias_name(text: str) -> str:
    """`text`, if it can name an alias here and in MLflow.

    Raises:
        InvalidInput: it cannot, or it is reserved (`latest`, `v3`, digits).
    """
    if not _ALIAS.fullmatch(text):
        raise InvalidInput(
            f"{text!r} cannot be an alias.", f"An alias is {_HOW.replace(chr(39) + '.' + chr(39) + ', ', '')}."
        )
    if _RESERVED_ALIAS.fullmatch(text):
        raise InvalidInput(
            f"{text!r} cannot be an alias: it is reserved.",
            "Digits are version numbers; MLflow keeps 'latest' and 'v3'.",
        )
    return text


@dataclass(frozen=True, slots=True)
class Address:
    """Where a version is: an adapter and a number, or an alias, or neither (production, else the newest)."""

    adapter: str
    number: int | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read `name@3`, `name@production` or `name`.

        Raises:
            InvalidInput: it is none of them.
        """
        name, at, pointer = text.partition("@")
        adapter_name(name)
        if not at:
            return cls(name)
        if pointer.isascii() and pointer.isdigit() and int(pointer) >= 1:
            return cls(name, number=int(pointer))
        try:
            return cls(name, alias=alias_name(pointer))
        except InvalidInput:
            raise InvalidInput(
                f"{text!r} is not the address of a version.",
                "An address is NAME@NUMBER or NAME@ALIAS, as in counting@3.",
            ) from None

    def __str__(self) -> str:
        pointer = self.number or self.alias
        return f"{self.adapter}@{pointer}" if pointer else self.adapter
