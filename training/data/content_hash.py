"""Where a piece of text falls: a hash that is the same in every process, on every machine, for every Python."""

import hashlib
import json
import re
import unicodedata

HASH_RANGE = 2**64

_CLOSING_PUNCTUATION = re.compile(r"[.,;:!?…]+(?=\s|$)")
_QUOTATION_MARKS = re.compile("[\"'`\u2018\u2019\u201c\u201d\u00ab\u00bb]")


def content_hash(*parts: str | int) -> int:
    """A uniform 64-bit integer, `0 <= h < HASH_RANGE`, that depends on the parts alone (blake2b of their JSON list)."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def folded(text: str) -> str:
    """`text` without the differences that make no difference: Unicode form, letter case, runs of white space."""
    caseless = unicodedata.normalize("NFKC", text).casefold()  # which may bring marks that compose anew
    return " ".join(unicodedata.normalize("NFKC", caseless).split())


def normalised(text: str) -> str:
    """`folded` text without quotation marks and punctuation that closes a word.

    Operators, brackets and the minus sign stay: `3 - 1` and `3 * 1` are different questions.
    """
    return " ".join(_CLOSING_PUNCTUATION.sub("", _QUOTATION_MARKS.sub("", folded(text))).split())
