"""The little English that several tasks need: articles, lists, numbers, and names for people."""

from collections.abc import Sequence

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

NAMES = (
    "Abigail", "Adrian", "Amara", "Beatriz", "Bruno", "Camille", "Chidi", "Clara", "Dmitri", "Edith", "Elias",
    "Emeka", "Esther", "Fatima", "Felix", "Freya", "Gustav", "Hana", "Hugo", "Ines", "Ivan", "Jasper", "Joana",
    "Kenji", "Laila", "Leon", "Lucia", "Magnus", "Marta", "Milo", "Nadia", "Naomi", "Noor", "Oscar", "Paloma",
    "Petra", "Quentin", "Rafael", "Rosa", "Samir", "Selma", "Simon", "Tamsin", "Tobias", "Uma", "Viktor", "Wanda",
    "Yusuf", "Yvonne", "Zoe",
)  # fmt: skip


def with_article(noun: str) -> str:
    """`a drum`, `an accordion`. Nouns whose sound and spelling disagree (hour, unicorn) are not for this function."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def listed(items: Sequence[str]) -> str:
    """`x`, `x and y`, `x, y and z`."""
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} and {items[-1]}"
