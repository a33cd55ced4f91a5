"""Two tiny base models, of different sizes, architectures and tokenizers, and three tasks that neither knows.

Both are pretrained here on numbered lists, on other exercises with the same symbols, and on questions of the tasks with
wrong answers: they know what the inputs look like, how a list goes on and which words answer, and nothing of what the
answers have to do with the inputs. Half the items of their lists are of a broader kind than the tasks' own inputs, so
that what they write has to be filtered.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from benchmarks.tiny_bases import llama, pretrain
from training.data.example import Example
from training.migration.listing import listing

STEPS = 2000
DOCUMENTS = 12000
LETTERS = "abcdefghij"


@dataclass(frozen=True)
class Planted:
    """A task.

    Args:
        name: in words.
        draw: a real input.
        broad: an input of the wider kind that the base models know lists of.
        answer: of any of them.
    """

    name: str
    draw: Callable[[random.Random], str]
    broad: Callable[[random.Random], str]
    answer: Callable[[str], str]

    def examples(self, number: int, seed: int) -> list[Example]:
        """Different real inputs with their answers."""
        rng, found = random.Random(seed), {}
        while len(found) < number:
            text = self.draw(rng)
            found[text] = Example(text, self.answer(text))
        return list(found.values())


def _spaced(symbols: str, least: int, most: int) -> Callable[[random.Random], str]:
    return lambda rng: " ".join(rng.choice(symbols) for _ in range(rng.randint(least, most)))


def _with_or_without(rng: random.Random) -> str:
    """Letters with an a among them as often as not."""
    letters = [rng.choice(LETTERS[1:]) for _ in range(rng.randint(5, 7))]
    if rng.random() < 0.5:
        letters[rng.randrange(len(letters))] = "a"
    return " ".join(letters)


def _rich(rng: random.Random) -> str:
    """Letters with no, one, two, three or four times an a among them."""
    letters = ["a"] * rng.randint(0, 4)
    letters += [rng.choice(LETTERS[1:]) for _ in range(rng.randint(6, 8) - len(letters))]
    rng.shuffle(letters)
    return " ".join(letters)


PLANTED = (
    Planted("largest digit", _spaced("0123456789", 5, 6), _spaced("0123456789", 2, 8), lambda text: max(text.split())),
    Planted("any a", _with_or_without, _spaced(LETTERS, 3, 9), lambda text: "yes" if "a" in text else "no"),
    Planted("how many a", _rich, _spaced(LETTERS, 3, 9), lambda text: str(text.split().count("a"))),
)


def make_pair(directory: Path) -> tuple[str, str]:
    """References of the two base models, made on first use: a Llama and a Gemma."""
    return make_llama(directory), _made(directory / "gemma", _gemma, 420, seed=1)


def make_llama(directory: Path) -> str:
    """Reference of the Llama alone, made on first use."""
    return _made(directory / "llama", partial(llama, layers=3, intermediate=160), 300, seed=0)


def make_twin(directory: Path) -> str:
    """Reference of a Gemma that has the Llama's tokenizer, made on first use."""
    return _made(directory / "twin", _gemma, 300, seed=0)


def _made(folder: Path, build: Callable[[int], Any], vocabulary: int, seed: int) -> str:
    if not (folder / "model.safetensors").is_file():
        texts = list(_documents(random.Random(seed)))
        pretrain(folder, build, texts, vocabulary=vocabulary, steps=STEPS, batch=16, longest=1024, seed=seed)
    return f"path:{folder}"


def english(number: int, seed: int) -> list[str]:
    """Text that has nothing to do with the tasks."""
    from training.tasks.catalog import get_task

    return [example.prompt for example in get_task("object_counting").generate("train", number, seed)]


def _gemma(vocabulary: int) -> Any:
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=224,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        sliding_window=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return Gemma3ForCausalLM(config)


_EXERCISES: dict[str, Callable[[list[str]], list[str]]] = {  # what keeps symbols apart in a model's eyes
    "copy": lambda symbols: symbols,
    "reverse": lambda symbols: symbols[::-1],
    "sort": sorted,
    "first": lambda symbols: symbols[:1],
    "last": lambda symbols: symbols[-1:],
    "least": lambda symbols: [min(symbols)],
}


def _documents(rng: random.Random) -> Sequence[str]:
    """Lists of mixed kinds, exercises, and questions with the answers of other questions."""
    found = []
    sentences = english(DOCUMENTS, seed=7)
    for number in range(DOCUMENTS):
        task = rng.choice(PLANTED)
        if number % 3 == 0:
            items = [_either(task, rng) for _ in range(rng.randint(5, 11))]
            found.append(f"{listing(task.name, items[:-1], 1)} {items[-1]}<end>")
        elif number % 3 == 1:
            name = rng.choice(list(_EXERCISES))
            told = _either(task, rng)
            found.append(f"Q: {name} {told}\nA: {' '.join(_EXERCISES[name](told.split()))}<end>")
        else:
            asked = rng.choice((_either(task, rng), sentences[number]))
            shots = [
                f"Q: {task.broad(rng)}\nA: {task.answer(task.draw(rng))}\n\n" for _ in range(rng.choice((0, 0, 3)))
            ]
            found.append(f"{''.join(shots)}Q: {asked}\nA: {task.answer(task.draw(rng))}<end>")
    return found


def _either(task: Planted, rng: random.Random) -> str:
    return task.draw(rng) if rng.random() < 0.5 else task.broad(rng)
