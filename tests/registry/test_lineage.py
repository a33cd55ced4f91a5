from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import delete

from infra.errors import Conflict, InvalidInput
from registry import AdapterRegistry
from registry.lineage import LineageData
from registry.models import LineageEdge
from registry.records import DatasetRecord
from tests.registry.conftest import OTHER_BASE


def test_a_family_reaches_up_and_down_across_bases(registry: AdapterRegistry, register: Callable[..., str]) -> None:
    grandparent, parent, other_parent = register(), register(), register("sorting")
    child = register(base_identity=OTHER_BASE)
    stranger = register("stranger")
    registry.add_edge(parent, grandparent, "trained_further", {"steps": 5})
    registry.add_edge(child, parent, "migrated_from")
    registry.add_edge(child, other_parent, "merged_from")
    registry.set_alias(child, "challenger", actor="ada")
    graph = registry.lineage(parent)
    assert [(node.address, node.distance) for node in graph.nodes] == [(grandparent, -1), (parent, 0), (child, 1)]
    assert {node.address for node in registry.lineage(child).nodes} == {grandparent, parent, other_parent, child}
    assert [node.address for node in registry.lineage(stranger).nodes] == [stranger]
    (leaf,) = [node for node in graph.nodes if node.address == child]
    assert (leaf.base, leaf.method, leaf.aliases) == ("tiny-b", "lora", ("challenger",))


def test_what_came_to_a_base_is_found_for_the_whole_base(
    registry: AdapterRegistry, register: Callable[..., str]
) -> None:
    moved, stays, merged = register(), register("sorting"), register()
    children = [register(base_identity=OTHER_BASE) for _ in range(3)]
    registry.add_edge(children[1], moved, "migrated_from")
    registry.add_edge(children[0], moved, "migrated_from", {"inputs": 7})
    registry.add_edge(children[2], merged, "merged_from")
    registry.add_edge(stays, merged, "migrated_from")

    def found() -> list[tuple[str, str]]:
        return [(edge.parent, edge.child) for edge in registry.edges_onto("tiny-b", "migrated_from")]

    assert found() == [(moved, children[0]), (moved, children[1])]
    assert registry.edges_onto("tiny-b", "migrated_from")[0].details == {"inputs": 7}
    registry.retire(children[1])
    assert found() == [(moved, children[0])]
    assert [edge.child for edge in registry.edges_onto("tiny-a", "migrated_from")] == [stays]


def test_the_graph_has_a_json_and_a_mermaid_form(registry: AdapterRegistry, register: Callable[..., str]) -> None:
    parent, child = register(), register()
    registry.add_edge(child, parent, "compressed_from", {"codec": "compeft"})
    graph = registry.lineage(child)
    assert graph.to_json()["edges"] == [
        {"parent": parent, "child": child, "relation": "compressed_from", "details": {"codec": "compeft"}}
    ]
    lines = graph.to_mermaid().splitlines()
    assert lines[0] == "graph TD"
    assert '    v0["counting@1<br/>lora on tiny-a"]' in lines
    assert "    v0 -->|compressed_from| v1" in lines


def test_data_sets_are_parents_of_what_was_trained_on_them(
    registry: AdapterRegistry, register: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("{}")
    registry.keep_dataset("counting", folder, fingerprint="f" * 64, rows=1234, origin={})
    drawn = DatasetRecord("rows", "d" * 64, 1000, {}, drawn_from="counting@1")
    parent = register(dataset=drawn)
    child, stranger = register(), register("sorting")
    other = register("sorting", dataset=drawn)
    registry.add_edge(child, parent, "compressed_from")
    graph = registry.lineage(child)
    assert graph.data_sets == (LineageData("counting@1", 1234, (parent,)),)
    assert other not in {node.address for node in graph.nodes}
    assert graph.to_json()["data_sets"] == [{"address": "counting@1", "rows": 1234, "made": [parent]}]
    lines = graph.to_mermaid().splitlines()
    assert '    d0[("counting@1<br/>1,234 rows")]' in lines
    assert "    d0 -->|made_from| v0" in lines
    assert registry.lineage(stranger).data_sets == ()


def test_a_version_is_not_its_own_parent(registry: AdapterRegistry, register: Callable[..., str]) -> None:
    address = register()
    with pytest.raises(InvalidInput, match="own parent"):
        registry.add_edge(address, address, "merged_from")


def test_saying_it_twice_changes_nothing(registry: AdapterRegistry, register: Callable[..., str]) -> None:
    parent, child = register(), register()
    for _ in range(2):
        registry.add_edge(child, parent, "merged_from")
    assert len(registry.lineage(child).edges) == 1


def test_no_sequence_of_edges_makes_a_cycle(registry: AdapterRegistry, register: Callable[..., str]) -> None:
    addresses = [register() for _ in range(5)]
    pairs = list(permutations(range(5), 2))

    @hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(pairs), max_size=15))
    def check(edges: list[tuple[int, int]]) -> None:
        with registry.database.writing() as session:
            session.execute(delete(LineageEdge))
        accepted: set[tuple[int, int]] = set()
        for child, parent in edges:
            makes_a_cycle = reaches(accepted, parent, child)
            try:
                registry.add_edge(addresses[child], addresses[parent], "merged_from")
                accepted.add((child, parent))
                assert not makes_a_cycle
            except Conflict:
                assert makes_a_cycle

    check()


def reaches(edges: set[tuple[int, int]], start: int, goal: int) -> bool:
    """Brute force: is `goal` among the ancestors of `start`?"""
    return start == goal or any(reaches(edges, parent, goal) for child, parent in edges if child == start)
