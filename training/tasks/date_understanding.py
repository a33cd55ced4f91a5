"""Dates: the date some days, weeks, months or years away from one that is described."""

import random
from calendar import monthrange
from collections.abc import Callable
from datetime import date, timedelta

from training.data.example import Example
from training.tasks.english import NUMBER_WORDS
from training.tasks.options import multiple_choice
from training.tasks.task import Task

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip

DAYS_FROM_TODAY = {
    "yesterday": -1,
    "tomorrow": 1,
    "10 days ago": -10,
    "one week ago": -7,
    "one week from today": 7,
    "two weeks from today": 14,
    "24 hours later": 1,
}
MONTHS_FROM_TODAY = {"one month ago": -1, "one month from today": 1, "one year ago": -12, "one year from today": 12}


def draw(rng: random.Random) -> Example:
    """`Yesterday was April 30, 2021. What is the date tomorrow in MM/DD/YYYY?` → `(D)`."""
    stated, description = _described_date(rng)
    premise, offset = _premise(rng)  # the stated date is `offset` days after today
    today = stated - timedelta(days=offset)
    asked = {"today": today} if offset else {}
    asked |= {when: today + timedelta(days=days) for when, days in DAYS_FROM_TODAY.items()}
    if today.day <= 28:  # what is a month before March 31? and a year before February 29? Not asked here.
        asked |= {when: _shift_months(today, months) for when, months in MONTHS_FROM_TODAY.items()}
    when = rng.choice(tuple(asked))
    answer = asked[when]
    question = f"{premise.format(date=description)} What is the date {when} in MM/DD/YYYY?"
    return multiple_choice(rng, question, _numeric(answer), [_numeric(day) for day in _distractors(rng, answer)])


def _described_date(rng: random.Random) -> tuple[date, str]:
    """A date and the words for it."""
    year = rng.randint(1950, 2049)
    month = rng.randint(1, 12)
    day = date(year, month, rng.randint(1, monthrange(year, month)[1]))
    descriptions: tuple[Callable[[], tuple[date, str]], ...] = (
        lambda: (day, f"{MONTHS[month - 1]} {day.day}, {year}"),
        lambda: (day, f"{day.day} {MONTHS[month - 1]} {year}"),
        lambda: (day, f"{_numeric(day)} (MM/DD/YYYY)"),
        lambda: (date(year, month, monthrange(year, month)[1]), f"the last day of {MONTHS[month - 1]} {year}"),
        lambda: (_first_weekday(year, month, 0), f"the first Monday of {MONTHS[month - 1]} {year}"),
        lambda: (date(year, 12, 24), f"Christmas Eve of {year}"),
    )
    # Plain dates are the common case; the last three have far fewer values each.
    return rng.choices(descriptions, weights=(5, 5, 4, 2, 2, 1))[0]()


def _premise(rng: random.Random) -> tuple[str, int]:
    """A sentence about the stated date, and how many days after today it lies."""
    n = rng.randint(3, 9)
    return rng.choice(
        (
            ("Today is {date}.", 0),
            ("Yesterday was {date}.", -1),
            ("The day before yesterday was {date}.", -2),
            ("Tomorrow is {date}.", 1),
            ("The day after tomorrow is {date}.", 2),
            (f"{NUMBER_WORDS[n].capitalize()} days ago it was {{date}}.", -n),
            (f"In {NUMBER_WORDS[n]} days it will be {{date}}.", n),
        )
    )


def _distractors(rng: random.Random, answer: date) -> list[date]:
    """Five plausible wrong dates: a day, a week, a month or a year off."""
    near = {answer + timedelta(days=days) for days in (-10, -7, -2, -1, 1, 2, 7, 10)}
    near |= {_shift_months(answer, months) for months in (-12, -1, 1, 12)}
    return rng.sample(sorted(near), 5)


def _shift_months(day: date, months: int) -> date:
    """The same day of the month some months away, or that month's last day."""
    year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    return date(year, month + 1, min(day.day, monthrange(year, month + 1)[1]))


def _first_weekday(year: int, month: int, weekday: int) -> date:
    first = date(year, month, 1)
    return first + timedelta(days=(weekday - first.weekday()) % 7)


def _numeric(day: date) -> str:
    return f"{day.month:02}/{day.day:02}/{day.year}"


TASK = Task(
    name="date_understanding",
    description="The date some days, weeks, months or years away from one that is described.",
    metric="multiple_choice",
    instruction="Work out the date and choose the right option. Answer with its letter, as in (A).",
    max_completion_tokens=4,
    draw=draw,
)
