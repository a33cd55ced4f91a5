"""A planted world to select texts from: what a tiny base was pretrained on, a pool that is much like it, and targets.

Texts tell of something that is wrong with a part of a dog, a car, a computer, an instrument or a bird, and what helped:
which of 16 remedies it is depends on the part, and is shuffled by the seed. One in ten is a letter, the others are
reports; the words of topics are the same in both.

| share of | dogs | cars, computers, instruments | birds | noise |
|---|---:|---:|---:|---:|
| pretraining | 60 % | 13 % each | 1 % | – |
| the pool | 55 % | 10 % each | 5 % | 10 % |

Three targets: `rare` is all birds; `half covered` is dogs and birds in equal parts, where the base knows dogs well and
the pool has as large a share of them; `in letters` is the same in letters, whose phrases other topics share.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.tiny_bases import llama, pretrain
from training.data.example import Example

DOCUMENTS, STEPS = 12000, 1200
POOL = 4000
LETTERS = 0.1
ASKED = 0.25  # of the documents of pretraining, so that the base has seen questions


@dataclass(frozen=True)
class Topic:
    """Words of a topic; remedies are as many as parts."""

    subjects: tuple[str, ...]
    signs: tuple[str, ...]
    parts: tuple[str, ...]
    remedies: tuple[str, ...]


def _topic(subjects: str, signs: str, parts: str, remedies: str) -> Topic:
    return Topic(*(tuple(words.split()) for words in (subjects, signs, parts, remedies)))


TOPICS = {
    "dogs": _topic(
        "terrier spaniel poodle beagle collie hound puppy bulldog",
        "sore swollen bruised stiff",
        "paw ear snout jaw coat hip knee tooth tongue eye belly back neck claw gum throat",
        "rest walks shampoo broth bandages massage brushing ointment sleep play water pills rice warmth vaccine honey",
    ),
    "cars": _topic(
        "sedan van truck coupe jeep minibus taxi limousine",
        "noisy worn leaking rusty",
        "clutch brake gearbox radiator exhaust bumper axle engine tyre wheel door pump starter mirror seat valve",
        "oil welding paint grease coolant tuning rubber steel bolts filters petrol fuses sanding antifreeze towing wax",
    ),
    "computers": _topic(
        "laptop server tablet desktop printer router phone notebook",
        "slow frozen broken faulty",
        "keyboard screen disk battery memory port fan cable driver camera speaker browser network display mouse "
        "charger",
        "rebooting updates backups software replacement soldering formatting cleaning drivers passwords cooling "
        "restoring patches resetting adapters storage",
    ),
    "instruments": _topic(
        "violin cello guitar piano flute trumpet clarinet harp",
        "dull cracked loose wobbly",
        "string bow bridge pedal key reed neck pipe hammer soundboard peg fret mouthpiece pad lid case",
        "rosin varnish glue polish felt humidity cork restringing voicing lacquer beeswax leather planing ebony resin "
        "shims",
    ),
    "birds": _topic(
        "parrot budgie canary finch cockatoo raven falcon pigeon",
        "ragged pale flaky drooping",
        "beak wing crest talon plumage crop down quill gizzard keel wattle spur feather nostril tail perching-foot",
        "zinc iodine kelp millet chalk sunflower misting cuttlebone figs grit calcium aloe sprouts seeds perches lamps",
    ),
}
PRETRAINING = {"dogs": 0.60, "cars": 0.13, "computers": 0.13, "instruments": 0.13, "birds": 0.01}
SHARES = {"dogs": 0.55, "cars": 0.10, "computers": 0.10, "instruments": 0.10, "birds": 0.05, "noise": 0.10}
HALVES = {"dogs": 0.5, "birds": 0.5}
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_NAMES = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Greta",
    "Henry",
    "Ida",
    "Jonas",
    "Karin",
    "Leo",
    "Maria",
    "Nils",
    "Olga",
    "Paul",
)
_PLACES = ("Bergen", "Lyon", "Turin", "Porto", "Graz", "Leeds", "Malmo", "Ghent", "Krakow", "Basel")


@dataclass(frozen=True)
class Target:
    """What rows are wanted for.

    Args:
        shares: of its topics.
        letters: the share of letters.
    """

    shares: Mapping[str, float]
    letters: float


TARGETS = {
    "rare": Target({"birds": 1.0}, 0.0),
    "half covered": Target(HALVES, 0.0),
    "in letters": Target(HALVES, 1.0),
}


@dataclass(frozen=True)
class Case:
    """One text.

    Args:
        topic: or noise.
        told: without its last sentence: the input of the task.
        ending: that sentence up to the remedy.
        remedy: the answer.
    """

    topic: str
    told: str
    ending: str
    remedy: str

    @property
    def text(self) -> str:
        """The whole."""
        return f"{self.told} {self.ending.format(self.remedy)}" if self.ending else self.told

    @property
    def example(self) -> Example:
        """Of the task."""
        return Example(self.told, self.remedy)


@dataclass(frozen=True)
class World:
    """Which part needs which remedy; and all that is drawn.

    Args:
        seed: of everything.
    """

    seed: int

    def base(self, directory: Path) -> str:
        """Reference of a model that has read what is common in this world, made on first use."""
        folder = directory / f"base-{self.seed}"
        if not (folder / "model.safetensors").is_file():
            texts = [self._read(case, number) for number, case in enumerate(self._pretraining())]
            build = partial(llama, layers=3, intermediate=160)
            pretrain(folder, build, texts, vocabulary=700, steps=STEPS, batch=16, longest=256, seed=self.seed)
        return f"path:{folder}"

    def pool(self, rows: int = POOL) -> list[Case]:
        """The candidates, all different."""
        return self._drawn("pool", rows, SHARES, LETTERS)

    def target(self, name: str, use: str, number: int) -> list[Case]:
        """Cases of a target, others for each use."""
        return self._drawn(f"{name} {use}", number, TARGETS[name].shares, TARGETS[name].letters)

    def _pretraining(self) -> list[Case]:
        return self._drawn("pretraining", DOCUMENTS, PRETRAINING, LETTERS)

    def _read(self, case: Case, number: int) -> str:
        asked = number % round(1 / ASKED) == 0
        return f"Q: {case.told}\nA: {case.remedy}<end>" if asked else f"{case.text}<end>"

    def _drawn(self, purpose: str, number: int, shares: Mapping[str, float], letters: float) -> list[Case]:
        rng = random.Random(f"{purpose} of {self.seed}")
        remedies = {name: self._remedies(name) for name in TOPICS}
        found: dict[str, Case] = {}
        for topic, share in shares.items():
            wanted = len(found) + round(share * number)
            while len(found) < wanted:
                case = noise(rng) if topic == "noise" else told(topic, remedies[topic], letters, rng)
                found[case.told] = case
        cases = list(found.values())
        rng.shuffle(cases)
        return cases

    def _remedies(self, topic: str) -> dict[str, str]:
        words = TOPICS[topic]
        shuffled = random.Random(f"{topic} of {self.seed}").sample(words.remedies, len(words.remedies))
        return dict(zip(words.parts, shuffled, strict=True))


def told(topic: str, remedies: Mapping[str, str], letters: float, rng: random.Random) -> Case:
    """A report or a letter."""
    words = TOPICS[topic]
    subject, sign, part = (rng.choice(choices) for choices in (words.subjects, words.signs, words.parts))
    day, name, place, number = rng.choice(_DAYS), rng.choice(_NAMES), rng.choice(_PLACES), rng.randint(2, 60)
    write: Callable[..., tuple[str, str]] = letter if rng.random() < letters else report
    begun, ending = write(subject, f"{sign} {part}", day, name, place, number)
    return Case(topic, begun, ending, remedies[part])


def report(subject: str, trouble: str, day: str, name: str, place: str, number: int) -> tuple[str, str]:
    """What is told, and how it ends."""
    return (
        f"{place}, {day}. A {subject} came in with a {trouble}. {name} had a look at it for {number} minutes.",
        "The remedy was {}.",
    )


def letter(subject: str, trouble: str, day: str, name: str, place: str, number: int) -> tuple[str, str]:
    """The same in other words."""
    begun = f"Dear friends, since {day} my {subject} has had a {trouble} and I did not know what to do."
    return (
        f"{begun} I wrote to {name} from {place}, who has seen {number} of them.",
        "In the end what helped us was {}.",
    )


def noise(rng: random.Random) -> Case:
    """Letters that mean nothing."""
    words = ("".join(rng.choice("bcdfghjklmnpqrstvwxz") for _ in range(rng.randint(2, 7))) for _ in range(20))
    return Case("noise", " ".join(words), "", "")
