"""From a list of chat turns to a prompt and the answer to it."""

from typing import Any

from infra.errors import InvalidInput

SPEAKERS = {"user": "User", "assistant": "Assistant"}


def last_exchange(place: str, messages: Any) -> tuple[str, str]:
    """The last assistant turn, and what came before it as one prompt; later turns do not count.

    A single user turn is the prompt as it stands. A longer history is written out with `User:` and `Assistant:`
    before the turns; a system message opens the prompt as a paragraph of its own.

    Args:
        place: names the row in errors.
        messages: a list of `{"role": …, "content": …}`, of system, user and assistant.

    Raises:
        InvalidInput: not such a list, or no assistant turn that answers a user.
    """
    turns = [_turn(place, number, message) for number, message in enumerate(_list(place, messages), start=1)]
    answers = [position for position, (role, _) in enumerate(turns) if role == "assistant"]
    if not answers:
        raise InvalidInput(f"{place}: messages have no assistant turn.", "The last assistant turn is the completion.")
    history, (_, completion) = turns[: answers[-1]], turns[answers[-1]]
    if not any(role == "user" for role, _ in history):
        raise InvalidInput(f"{place}: no user turn comes before the last assistant turn.", "Add the question.")
    system = [content for role, content in history if role == "system"]
    spoken = [(role, content) for role, content in history if role != "system"]
    if len(spoken) == 1:
        return "\n\n".join([*system, spoken[0][1]]), completion
    return "\n\n".join([*system, *(f"{SPEAKERS[role]}: {content}" for role, content in spoken)]), completion


def _list(place: str, messages: Any) -> list[Any]:
    if not isinstance(messages, list):
        raise InvalidInput(
            f"{place}: messages are {type(messages).__name__}, not a list of turns.",
            'Write [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}].',
        )
    return messages


def _turn(place: str, number: int, message: Any) -> tuple[str, str]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("system", *SPEAKERS):
        raise InvalidInput(f"{place}: turn {number} has the role {role!r}.", "Roles are system, user and assistant.")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise InvalidInput(f"{place}: the content of turn {number} is not text.", "Write it as a string.")
    return role, content or ""
