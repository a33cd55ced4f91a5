from training.tasks.catalog import get_task
from training.tasks.word_sorting import WORDS


def test_answers_hold_the_given_words_in_order():
    items = get_task("word_sorting").generate("train", 400, seed=1)
    for item in items:
        given = item.prompt.split("List: ")[1].split(" ")
        remaining, selected = list(given), []
        while remaining:  # selection sort, letter by letter
            smallest = remaining[0]
            for word in remaining[1:]:
                if [ord(letter) for letter in word] < [ord(letter) for letter in smallest]:
                    smallest = word
            remaining.remove(smallest)
            selected.append(smallest)
        assert item.completion == " ".join(selected), item


def test_words_are_plain_and_distinct():
    assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)
    assert len(set(WORDS)) == len(WORDS) > 250
