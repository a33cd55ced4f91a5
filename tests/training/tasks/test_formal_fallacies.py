import re
from itertools import combinations_with_replacement, product

from training.tasks.catalog import get_task

# (pattern, quantifier, whether the form negates its predicate, order of subject and predicate)
FORMS = (
    (r"Everyone who is (.*) is (.*)\.", "all", False, "sp"),
    (r"Whoever is (.*) is (.*)\.", "all", False, "sp"),
    (r"Nobody who is (.*) is (.*)\.", "all", True, "sp"),
    (r"Being (.*) is sufficient for being (.*)\.", "all", False, "sp"),
    (r"Being (.*) is necessary for being (.*)\.", "all", False, "ps"),
    (r"No (.*) is (.*)\.", "all", True, "sp"),
    (r"Someone who is (.*) is (.*)\.", "some", False, "sp"),
    (r"At least one person is (.*) and is (.*)\.", "some", False, "sp"),
)


def test_answers_survive_the_search_for_a_counterexample():
    """Every world of up to two people is tried.

    An argument has at most one `some` premise and denies at most one `all`, so if it has a counterexample, then the
    witness of the one and the exception to the other make one.
    """
    items = get_task("formal_fallacies").generate("train", 300, seed=1)
    used = set()
    for item in items:
        text = item.prompt.split("\n")[0]
        *premises, conclusion = re.split(r" ?(?:First|Second|Third) premise: | Conclusion: ", text)[1:]
        used.update(_form(sentence) for sentence in (*premises, conclusion))
        assert sum(FORMS[_form(premise)][1] == "some" for premise in premises) <= 1
        people = sorted({noun for sentence in (*premises, conclusion) for _, noun in _literals(sentence)})
        types = [dict(zip(people, values, strict=True)) for values in product((True, False), repeat=len(people))]
        worlds = [(one,) for one in types] + list(combinations_with_replacement(types, 2))
        counterexample = any(
            not _true(conclusion, world) and all(_true(premise, world) for premise in premises) for world in worlds
        )
        assert item.completion == ("invalid" if counterexample else "valid"), item
    assert used == set(range(len(FORMS))), "every way of speaking has been checked"


def _form(sentence: str) -> int:
    return next(number for number, form in enumerate(FORMS) if re.fullmatch(form[0], sentence))


def _literals(sentence: str) -> list[tuple[bool, str]]:
    """(positive, noun) of subject and predicate, in that order, as the form means them."""
    pattern, _, predicate_negated, order = FORMS[_form(sentence)]
    groups = re.fullmatch(pattern, sentence).groups()
    subject, predicate = groups if order == "sp" else reversed(groups)
    literals = []
    for phrase, negated in ((subject, False), (predicate, predicate_negated)):
        positive = not phrase.startswith("not ")
        literals.append((positive != negated, re.sub(r"^(not )?(an? )?", "", phrase)))
    return literals


def _true(sentence: str, world: tuple[dict[str, bool], ...]) -> bool:
    (subject_positive, subject), (predicate_positive, predicate) = _literals(sentence)
    subjects = [person for person in world if person[subject] == subject_positive]
    hits = [person[predicate] == predicate_positive for person in subjects]
    return all(hits) if FORMS[_form(sentence)][1] == "all" else any(hits)
