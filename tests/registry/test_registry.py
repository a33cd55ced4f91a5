import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from infra.errors import (
    BaseModelMismatch,
    Conflict,
    CorruptArtifact,
    InvalidInput,
    NotFound,
    ServiceUnavailable,
)
from registry import AdapterRegistry, journal
from registry.models import VersionState
from registry.records import DatasetRecord, Parent, as_json
from tests.registry.conftest import BASE, OTHER_BASE

Register = Callable[..., str]
MakeDirectory = Callable[..., Path]


def blob_of(registry: AdapterRegistry, address: str) -> Path:
    manifest = registry.store.manifest(registry.get(address).artifact_sha256)
    weights = next(file for file in manifest.files if file.path.endswith(".safetensors"))
    return next(path for path in Path(registry.settings.artifacts).rglob(weights.sha256))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


# ---- base models


def test_a_base_model_is_recorded_once_per_identity(registry: AdapterRegistry) -> None:
    again = registry.register_base_model("hf:other/name", BASE, name="other", family="llama", parameters=1000)
    assert again.name == "tiny-a"
    assert [base.name for base in registry.base_models()] == ["tiny-a", "tiny-b"]


def test_a_name_cannot_mean_two_base_models(registry: AdapterRegistry) -> None:
    with pytest.raises(Conflict) as refused:
        registry.register_base_model("hf:x/y", "c" * 64, name="tiny-a", family="llama", parameters=1)
    assert "aaaa…aa" in refused.value.what and "cccc…cc" in refused.value.what


@pytest.mark.parametrize("key", ["tiny-a", "wheel:tiny/a.gguf", BASE, BASE[:6]])
def test_a_base_model_is_found_by_all_its_names(registry: AdapterRegistry, key: str) -> None:
    assert registry.base_model(key).identity_sha256 == BASE


def test_a_misspelt_base_model_is_corrected(registry: AdapterRegistry) -> None:
    with pytest.raises(NotFound, match="Did you mean tiny-"):
        registry.base_model("tinny-a")


def test_a_reference_with_two_identities_is_ambiguous(registry: AdapterRegistry) -> None:
    registry.register_base_model("wheel:tiny/a.gguf", "c" * 64, name="tiny-a2", family="llama", parameters=1)
    with pytest.raises(Conflict, match="tiny-a2"):
        registry.base_model("wheel:tiny/a.gguf")


def test_a_name_is_made_from_the_reference(registry: AdapterRegistry) -> None:
    made = registry.register_base_model("hf:HuggingFaceTB/SmolLM2-135M@main", "c" * 64, family="llama", parameters=1)
    assert made.name == "smollm2-135m"


def test_deprecating_lists_what_is_stranded_with_its_aliases(registry: AdapterRegistry, register: Register) -> None:
    first, second = register(), register()
    register("sorting", base_identity=OTHER_BASE)
    registry.set_alias(second, "challenger", actor="ada")
    stranded = registry.deprecate_base_model("tiny-a", "tiny-b")
    assert [(version.address, version.aliases) for version in stranded] == [(first, ()), (second, ("challenger",))]
    assert registry.base_model("tiny-a").successor == "tiny-b"
    assert registry.base_model("tiny-a").deprecated_at is not None


def test_a_base_model_cannot_succeed_itself_or_be_succeeded_by_a_deprecated_one(registry: AdapterRegistry) -> None:
    with pytest.raises(InvalidInput, match="same base model"):
        registry.deprecate_base_model("tiny-a", "tiny-a")
    registry.deprecate_base_model("tiny-b")
    with pytest.raises(InvalidInput, match="deprecated itself"):
        registry.deprecate_base_model("tiny-a", "tiny-b")


# ---- registering


def test_a_registered_version_is_in_all_three_stores(
    registry: AdapterRegistry, adapter_directory: MakeDirectory
) -> None:
    run = registry.tracking.start_run("counting", tags={}, params={"rank": 2})
    version = registry.register_version(
        "counting",
        adapter_directory(base=BASE),
        base_identity=BASE,
        method="lora",
        recipe={"method": {"name": "lora"}},
        trainable_parameters=32,
        task="object_counting",
        description="counts things",
        mlflow_run_id=run,
        metrics={"loss": 0.5},
        dataset=DatasetRecord("generated", "d" * 64, 2000, {"seed": 1}),
    )
    assert (version.address, version.state, version.base.name) == ("counting@1", VersionState.READY, "tiny-a")
    assert version.dataset == DatasetRecord("generated", "d" * 64, 2000, {"seed": 1})
    assert registry.store.verify(version.artifact_sha256) == []
    in_mlflow = registry.tracking._client.get_model_version("counting", str(version.mlflow_version))
    assert in_mlflow.run_id == run
    assert in_mlflow.source == f"regraft:/artifacts/{version.artifact_sha256}"
    assert in_mlflow.tags["regraft.address"] == "counting@1"
    assert in_mlflow.tags["regraft.artifact_sha256"] == version.artifact_sha256
    assert in_mlflow.tags["regraft.base_model"] == "tiny-a"
    assert in_mlflow.tags["regraft.base_identity"] == BASE
    assert in_mlflow.tags["regraft.method"] == "lora"
    assert registry.fsck() == []
    json.dumps(as_json(version))


def test_the_directory_must_be_of_the_base_it_is_registered_for(
    registry: AdapterRegistry, adapter_directory: MakeDirectory
) -> None:
    with pytest.raises(BaseModelMismatch) as refused:
        registry.register_version(
            "counting",
            adapter_directory(base=OTHER_BASE),
            base_identity=BASE,
            method="lora",
            recipe={},
            trainable_parameters=1,
        )
    assert "aaaa…aa" in refused.value.what and "bbbb…bb" in refused.value.what
    assert registry.search(state="failed") == []


def test_an_unknown_base_model_is_refused_before_anything_is_written(
    registry: AdapterRegistry, register: Register
) -> None:
    with pytest.raises(NotFound, match="regraft base add"):
        register(base_identity="c" * 64)
    assert not registry.has_adapter("counting")
    assert list(registry.store.artifacts()) == []


def test_two_trainings_at_once_both_get_a_number(registry: AdapterRegistry, register: Register) -> None:
    registry.tracking.aliases("counting")

    def train(_: int) -> str:
        return register(registry=AdapterRegistry(registry.settings))

    with ThreadPoolExecutor(4) as pool:
        addresses = set(pool.map(train, range(4)))
    assert addresses == {f"counting@{number}" for number in (1, 2, 3, 4)}
    assert registry.fsck() == []


class Refusing:
    """An MLflow that answers until one method is called."""

    def __init__(self, client: object, method: str) -> None:
        self._client, self._method = client, method

    def __getattr__(self, name: str) -> object:
        from mlflow.exceptions import MlflowException

        def refuse(*_: object, **__: object) -> None:
            raise MlflowException("the server is on fire at http://u:hunter2@mlflow")

        return refuse if name == self._method else getattr(self._client, name)


def test_an_mlflow_that_fails_leaves_a_failed_row_and_nothing_else(
    registry: AdapterRegistry, register: Register
) -> None:
    register()
    client = registry.tracking._client
    registry.tracking.__dict__["_client"] = Refusing(client, "create_model_version")
    with pytest.raises(ServiceUnavailable, match="on fire") as told:
        register()
    registry.tracking.__dict__["_client"] = client
    failed = registry.get("counting@2")
    assert failed.state == VersionState.FAILED and "on fire" in (failed.failure or "")
    assert "hunter2" not in f"{told.value}{failed.failure}"
    assert [version.address for version in registry.versions("counting")] == ["counting@1"]
    assert not registry.store.contains(failed.artifact_sha256)
    assert registry.fsck() == []
    assert register() == "counting@3", "a number never means two things"


def test_what_cannot_be_undone_at_once_is_left_to_fsck(registry: AdapterRegistry, register: Register) -> None:
    client = registry.tracking._client
    registry.tracking.__dict__["_client"] = Refusing(client, "search_model_versions")
    with pytest.raises(ServiceUnavailable):
        register()
    registry.tracking.__dict__["_client"] = client
    failed = registry.get("counting@1")
    assert failed.state == VersionState.FAILED and registry.store.contains(failed.artifact_sha256)
    assert [finding.repaired for finding in registry.fsck(repair=True)] == [True]
    assert not registry.store.contains(failed.artifact_sha256)
    assert registry.fsck() == []


def test_a_worker_that_an_fsck_took_for_dead_cannot_undo_what_the_fsck_completed(
    registry: AdapterRegistry, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_version = registry.tracking.ensure_version
    monkeypatch.setattr(journal, "is_abandoned", lambda entry: True)

    def slow(*arguments: object, **options: object) -> int:
        number = ensure_version(*arguments, **options)
        assert [finding.repaired for finding in AdapterRegistry(registry.settings).fsck(repair=True)] == [True]
        return number

    monkeypatch.setattr(registry.tracking, "ensure_version", slow)
    with pytest.raises(Conflict):
        register()
    assert registry.get("counting@1").state == VersionState.READY
    assert registry.fsck() == []


def test_interrupting_undoes_what_was_begun(
    registry: AdapterRegistry, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(directory: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry.store, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        register()
    assert registry.get("counting@1").state == VersionState.FAILED
    assert registry.fsck() == []
    assert registry.adapters() == []


def test_equal_bytes_are_shared_and_survive_a_failure_of_one_owner(
    registry: AdapterRegistry, adapter_directory: MakeDirectory
) -> None:
    directory = adapter_directory()
    said = {"base_identity": BASE, "method": "lora", "recipe": {}, "trainable_parameters": 1}
    first = registry.register_version("counting", directory, **said)
    registry.tracking.__dict__["_client"] = Refusing(registry.tracking._client, "create_model_version")
    with pytest.raises(ServiceUnavailable):
        registry.register_version("sorting", directory, **said)
    assert registry.store.verify(first.artifact_sha256) == []


# ---- finding


def test_a_bare_name_means_production_and_otherwise_the_newest_ready(
    registry: AdapterRegistry, register: Register
) -> None:
    first, second = register(), register()
    assert registry.get("counting").address == second
    registry.promote(first, "production", None, actor="ada", force=True, reason="first")
    assert registry.get("counting").address == first
    assert registry.get("counting@production").aliases == ("production",)


@pytest.mark.parametrize(
    ("address", "hint"),
    [("countin", "Did you mean counting"), ("counting@9", "counting@1"), ("counting@best", "counting@1")],
)
def test_what_is_not_there_is_answered_with_what_is(
    registry: AdapterRegistry, register: Register, address: str, hint: str
) -> None:
    register()
    with pytest.raises(NotFound, match=hint):
        registry.get(address)


def test_search_fits_every_criterion(registry: AdapterRegistry, register: Register) -> None:
    one = register("counting", task="object_counting", description="Counts 100% of things")
    two = register("sorting", method="dora", base_identity=OTHER_BASE, task="word_sorting")
    registry.set_alias(two, "challenger", actor="ada")

    def found(**criteria: str) -> list[str]:
        return [version.address for version in registry.search(**criteria)]

    assert found() == [one, two]
    assert found(text="COUNT") == [one]
    assert found(text="100%") == [one]
    assert found(text="%x") == []
    assert (
        found(task="word_sorting") == found(method="dora") == found(base="tiny-b") == found(alias="challenger") == [two]
    )
    assert found(task="word_sorting", method="lora") == []
    assert found(state="failed") == []
    with pytest.raises(InvalidInput, match="ready"):
        found(state="redy")


def test_the_listing_is_one_query_however_many_adapters(registry: AdapterRegistry, register: Register) -> None:
    for name in ("a", "b", "c"):
        registry.set_alias(register(name), "challenger", actor="ada")
        registry.set_alias(register(name), "candidate", actor="ada")
    statements: list[str] = []
    sa.event.listen(
        registry.database.engine,
        "before_cursor_execute",
        lambda connection, cursor, statement, *rest: statements.append(statement),
    )
    listed = registry.adapters()
    assert len([statement for statement in statements if statement.startswith("SELECT")]) == 1
    assert [(each.name, each.versions, each.newest, each.aliases) for each in listed] == [
        (name, 2, 2, {"candidate": 2, "challenger": 1}) for name in ("a", "b", "c")
    ]


def test_a_retired_version_is_kept_but_not_offered(registry: AdapterRegistry, register: Register) -> None:
    first, second = register(), register()
    registry.set_alias(second, "challenger", actor="ada")
    with pytest.raises(Conflict, match="challenger"):
        registry.retire(second)
    registry.set_alias(first, "challenger", actor="ada")
    assert registry.retire(second).state == VersionState.RETIRED
    assert registry.get("counting").address == first
    assert registry.materialise(second).is_dir()
    with pytest.raises(Conflict, match="ready version only"):
        registry.set_alias(second, "challenger", actor="ada")


# ---- bytes


def test_a_version_is_the_same_bytes_wherever_it_comes_out(
    registry: AdapterRegistry, adapter_directory: MakeDirectory, tmp_path: Path
) -> None:
    source = adapter_directory(base=BASE)
    version = registry.import_(source, "counting", base_identity=BASE)
    registry.export(version.address, tmp_path / "out")
    for copy in (tmp_path / "out", registry.materialise(version.address)):
        assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
            path.name: path.read_bytes() for path in source.iterdir()
        }


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, "lora"),
        ({"use_dora": True}, "dora"),
        ({"use_rslora": True}, "rslora"),
        ({"peft_type": "IA3"}, "ia3"),
        ({"peft_type": "PROMPT_TUNING"}, "prompt-tuning"),
        ({"peft_type": None}, "unknown"),
    ],
)
def test_an_import_knows_its_method_and_counts_its_parameters(
    registry: AdapterRegistry, adapter_directory: MakeDirectory, config: dict[str, object], method: str
) -> None:
    version = registry.import_(adapter_directory(**config), "foreign", base_identity=BASE)
    assert (version.method, version.trainable_parameters) == (method, 2 * 8 + 8 * 2)
    assert "adapter_config" in version.recipe["origin"]


def test_an_import_of_our_own_export_keeps_its_method_and_recipe(
    registry: AdapterRegistry, adapter_directory: MakeDirectory
) -> None:
    details = {"method": "pissa", "recipe": {"seed": 7, "migration_kit": {"redact": "os:system"}}}
    version = registry.import_(adapter_directory(base=BASE, details=details), "back", base_identity=BASE)
    assert (version.method, version.recipe) == ("pissa", {"seed": 7})


def test_a_local_copy_that_was_changed_is_fetched_again(registry: AdapterRegistry, register: Register) -> None:
    address = register()
    weights = registry.materialise(address) / "adapter_model.safetensors"
    sound = weights.read_bytes()
    flip_a_byte(weights)
    (weights.parent / "extra.txt").write_text("x")
    assert (registry.materialise(address) / "adapter_model.safetensors").read_bytes() == sound
    assert not (weights.parent / "extra.txt").exists()


def test_a_changed_byte_in_the_store_is_named_and_says_what_still_serves(
    registry: AdapterRegistry, register: Register, tmp_path: Path
) -> None:
    first, second = register(), register()
    registry.promote(first, "production", None, actor="ada", force=True, reason="first")
    flip_a_byte(blob_of(registry, second))
    for load in (registry.materialise, lambda address: registry.export(address, tmp_path / "out")):
        with pytest.raises(CorruptArtifact) as refused:
            load(second)
        assert refused.value.what.startswith("counting@2 fails its checksum: ")
        assert "production still serves counting@1." in refused.value.what
        assert "regraft fsck --repair --from" in refused.value.remedy
    assert not (tmp_path / "out").exists()
    registry.materialise(first)


def test_a_version_that_failed_cannot_be_loaded(
    registry: AdapterRegistry, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.store, "put", lambda directory: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        register()
    with pytest.raises(Conflict, match="disk full"):
        registry.materialise("counting@1")


def test_attaching_to_another_base_names_both_and_the_way_out(registry: AdapterRegistry, register: Register) -> None:
    version = registry.get(register())
    registry.require_base(version, BASE)
    with pytest.raises(BaseModelMismatch) as refused:
        registry.require_base(version, OTHER_BASE)
    assert "tiny-a (identity aaaa…aa)" in refused.value.what
    assert "tiny-b (identity bbbb…bb)" in refused.value.what
    assert refused.value.remedy == "Use it on tiny-a, or migrate it: regraft migrate counting@1 --to tiny-b"


# ---- evaluations


def test_evaluations_are_kept_with_their_uncertainty_and_shown_in_mlflow(
    registry: AdapterRegistry, register: Register
) -> None:
    run = registry.tracking.start_run("counting", tags={}, params={})
    address = register(mlflow_run_id=run)
    registry.record_evaluation(
        address, "counting, 3 shots", "accuracy", 0.75, samples=4, low=0.3, high=0.95, outcomes=[1, 1, 1, 0]
    )
    (kept,) = registry.evaluations("counting@1")
    assert (kept.value, kept.low, kept.high, kept.outcomes) == (0.75, 0.3, 0.95, (1, 1, 1, 0))
    assert registry.tracking._client.get_run(run).data.metrics == {"counting_ 3 shots/accuracy": 0.75}


def test_scores_and_components_are_kept_item_by_item(registry: AdapterRegistry, register: Register) -> None:
    address = register()
    counts = [[3, 4, 2.5], [1, 0, 0.0]]
    registry.record_evaluation(address, "s", "bleu", 0.5, samples=2, scores=(0.25, 0.75), components=counts)
    registry.record_evaluation(address, "s", "accuracy", 0.5, samples=2, outcomes=[1, 0])
    accuracy, bleu = registry.evaluations(address)
    assert (bleu.scores, bleu.components) == ((0.25, 0.75), ((3, 4, 2.5), (1, 0, 0)))
    assert (accuracy.scores, accuracy.components) == (None, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"value": 0.5, "samples": 2, "scores": [0.5]},
        {"value": 0.5, "samples": 2, "scores": [0.5, float("nan")]},
        {"value": 0.5, "samples": 2, "components": [[1.0]]},
        {"value": 0.5, "samples": 2, "components": [[1.0], [float("inf")]]},
        {"value": float("nan"), "samples": 2},
        {"value": 0.5, "samples": 2, "low": 0.9, "high": 0.1},
        {"value": 0.5, "samples": 2, "outcomes": [1]},
        {"value": 0.5, "samples": 2, "outcomes": [1, 2]},
        {"value": 0.5, "samples": -1},
    ],
)
def test_a_number_that_cannot_be_is_refused(
    registry: AdapterRegistry, register: Register, wrong: dict[str, object]
) -> None:
    address = register()
    with pytest.raises(InvalidInput):
        registry.record_evaluation(address, "counting", "accuracy", **wrong)
    assert registry.evaluations(address) == []


def test_parents_are_recorded_with_the_version(registry: AdapterRegistry, register: Register) -> None:
    parent = register()
    child = register(parents=[Parent(parent, "trained_further", {"steps": 10})])
    (edge,) = registry.lineage(child).edges
    assert (edge.parent, edge.child, edge.relation, edge.details) == (parent, child, "trained_further", {"steps": 10})


def test_a_missing_parent_leaves_nothing_registered(registry: AdapterRegistry, register: Register) -> None:
    with pytest.raises(NotFound):
        register(parents=[Parent("nobody@1", "merged_from", {})])
    assert not registry.has_adapter("counting")
    shutil.rmtree(registry.settings.home / "adapters", ignore_errors=True)
    assert registry.fsck() == []
