"""Hides passwords and keys in URLs and messages, so that no secret reaches a log line, a report or an error."""

import re
from urllib.parse import parse_qsl, unquote

# Greedy up to the last @: a password with an unescaped @ or / must not leak its tail.
_USERINFO = re.compile(r"^(?P<user>[^:/?#]*):(?P<password>[^?#]*)@")
_SECRET_KEY = re.compile(r"pass|secret|token|credential|(?:^|_)key(?:$|_)", re.IGNORECASE)


def redacted_url(url: str) -> str:
    """`url` with its password, and every query value whose key sounds secret, replaced by `***`.

    Works for database URLs, http(s), s3 and plain paths alike; never raises, whatever it is given.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    rest = _USERINFO.sub(r"\g<user>:***@", rest, count=1)
    address, question_mark, query = rest.partition("?")
    if question_mark:
        pairs = (pair.partition("=") for pair in query.split("&"))
        query = "&".join(
            f"{key}=***" if _SECRET_KEY.search(key) else f"{key}{equals}{value}" for key, equals, value in pairs
        )
    return f"{scheme}://{address}{question_mark}{query}"


def without_secrets(text: str, url: str) -> str:
    """`text` (a driver's message, a log tail) with every secret that `url` carries replaced by `***`."""
    rest = url.partition("://")[2]
    secrets = {match["password"]} if (match := _USERINFO.match(rest)) else set()
    query = rest.partition("?")[2]
    secrets |= {value for key, value in parse_qsl(query) if _SECRET_KEY.search(key)}
    spellings = secrets | {unquote(secret) for secret in secrets}
    for secret in sorted(filter(None, spellings), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text.replace(url, redacted_url(url))
