import re
from datetime import date, datetime, timedelta

from training.tasks.catalog import get_task

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def test_answers_are_what_the_calendar_says():
    items = get_task("date_understanding").generate("train", 400, seed=1)
    for item in items:
        text, *_ = item.prompt.split("\n")
        premise, when = re.fullmatch(r"(.*)\. What is the date (.*) in MM/DD/YYYY\?", text).groups()
        options = dict(re.findall(r"^(\([A-Z]\)) (.*)$", item.prompt, re.M))
        assert tuple(options) == item.choices and len(set(options.values())) == 6
        assert options[item.completion] == _asked(_today(premise), when).strftime("%m/%d/%Y"), item


def _today(premise: str) -> date:
    for pattern, days in (
        (r"Today is (.*)", 0),
        (r"Yesterday was (.*)", 1),
        (r"The day before yesterday was (.*)", 2),
        (r"Tomorrow is (.*)", -1),
        (r"The day after tomorrow is (.*)", -2),
    ):
        if match := re.fullmatch(pattern, premise):
            return _parsed(match[1]) + timedelta(days=days)
    if match := re.fullmatch(r"(\w+) days ago it was (.*)", premise):
        return _parsed(match[2]) + timedelta(days=WORDS.index(match[1].lower()))
    match = re.fullmatch(r"In (\w+) days it will be (.*)", premise)
    return _parsed(match[2]) - timedelta(days=WORDS.index(match[1]))


def _parsed(text: str) -> date:
    if match := re.fullmatch(r"Christmas Eve of (\d+)", text):
        return date(int(match[1]), 12, 24)
    if match := re.fullmatch(r"the last day of (\w+ \d+)", text):
        day = datetime.strptime(match[1], "%B %Y").date()
        while (day + timedelta(days=1)).month == day.month:
            day += timedelta(days=1)
        return day
    if match := re.fullmatch(r"the first Monday of (\w+ \d+)", text):
        day = datetime.strptime(match[1], "%B %Y").date()
        while day.strftime("%A") != "Monday":
            day += timedelta(days=1)
        return day
    for form in ("%B %d, %Y", "%d %B %Y", "%m/%d/%Y (MM/DD/YYYY)"):
        try:
            return datetime.strptime(text, form).date()
        except ValueError:
            continue
    raise AssertionError(text)


def _asked(today: date, when: str) -> date:
    days = {
        "today": 0,
        "yesterday": -1,
        "tomorrow": 1,
        "24 hours later": 1,
        "10 days ago": -10,
        "one week ago": -7,
        "one week from today": 7,
        "two weeks from today": 14,
    }
    if when in days:
        return today + timedelta(days=days[when])
    if "year" in when:
        return today.replace(year=today.year + (1 if "from today" in when else -1))
    # A month away: the nearest day with the same number in the direction asked for.
    step = timedelta(days=1 if "from today" in when else -1)
    day = today + step
    while day.day != today.day:
        day += step
    assert 28 <= abs((day - today).days) <= 31
    return day
