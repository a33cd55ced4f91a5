"""Planning a fleet migration of ten thousand adapters, against asking the registry for each of them.

    python -m benchmarks.fleet_planning [--adapters 10000]

The registry is an empty one in a temporary folder (SQLite); its rows are written to the tables directly: half of the
adapters have an alias, nine of ten a kit, one of a hundred has moved already. The plain side reads each version and its
kit by address, on a sample, and is scaled up.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.results_file import Row, write

RECIPE = {
    "base": "old",
    "method": {"name": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"},
    "data": {"task": "object_counting", "sizes": {"train": 2000, "validation": 200, "test": 200}},
    "training": {"steps": 120, "batch_size": 8, "learning_rate": 1e-3},
    "evaluation": [{"samples": 200}],
    "seed": 0,
}
SAMPLE = 300
SECONDS = 10.0


def fill(adapters: int) -> None:
    """Write the rows."""
    from registry import AdapterRegistry
    from registry.attachments import MIGRATION_KIT
    from registry.models import Adapter, Alias, Attachment, LineageEdge, Version, VersionState

    registry = AdapterRegistry()
    old, new = (
        registry.register_base_model(f"path:/{name}", digit * 64, name=name, family="llama", parameters=10**8)
        for name, digit in (("old", "a"), ("new", "b"))
    )
    with registry.database.writing() as session:
        for number in range(adapters):
            name = f"adapter-{number:05d}"
            session.add(Adapter(id=number + 1, name=name, task="object_counting"))
        session.flush()

        def version(id_: int, adapter: int, at: int, base: int) -> Version:
            return Version(
                id=id_,
                uid=f"{id_:032d}",
                adapter_id=adapter,
                number=at,
                base_model_id=base,
                method="lora",
                recipe={"adapter": f"adapter-{adapter - 1:05d}", **RECIPE},
                metrics={"seconds": 180.0, "steps": 120.0, "final_loss": 0.3},
                artifact_sha256=f"{id_:064d}",
                size_bytes=10**6,
                trainable_parameters=10**6,
                mlflow_version=1,
                state=VersionState.READY,
            )

        bases = {record.name: place for place, record in enumerate((old, new), start=1)}
        for number in range(1, adapters + 1):
            session.add(version(number, number, 1, bases["old"]))
        session.flush()
        for number in range(1, adapters + 1):
            if number % 2 == 0:
                session.add(Alias(adapter_id=number, alias="production", version_id=number, generation=1))
            if number % 10:
                details = {"rows": 2000, "seeds": 5, "discriminator": 0.9, "task": "object counting"}
                session.add(
                    Attachment(
                        version_id=number,
                        relation=MIGRATION_KIT,
                        artifact_sha256=f"{number:064d}",
                        size_bytes=10**6,
                        details=details,
                        ready=True,
                    )
                )
            if number % 100 == 1:
                session.add(version(adapters + number, number, 2, bases["new"]))
                session.flush()
                told = {"seconds": 300.0, "inputs": 250, "compared": []}
                session.add(
                    LineageEdge(child_id=adapters + number, parent_id=number, relation="migrated_from", details=told)
                )


def main() -> None:
    """Measure and write results/fleet_planning.cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["REGRAFT_HOME"] = home
        from flows.fleet_plan import plan_fleet
        from registry import AdapterRegistry
        from registry.attachments import MIGRATION_KIT

        Path(home, "artifacts").mkdir()
        fill(options.adapters)
        times = []
        for _ in range(options.repeats):
            started = time.perf_counter()
            plan = plan_fleet("old", "new")
            times.append(time.perf_counter() - started)
        assert len(plan.items) == options.adapters and 0 < len(plan.to_do) < options.adapters
        registry, sample = AdapterRegistry(), plan.items[:: max(1, options.adapters // SAMPLE)]
        started = time.perf_counter()
        for item in sample:
            registry.get(item.address)
            registry.attachment(item.address, MIGRATION_KIT)
        one_by_one = (time.perf_counter() - started) / len(sample) * options.adapters
    seconds, what = statistics.median(times), f"a plan for {options.adapters:,} adapters"
    write(
        "fleet_planning",
        [
            Row(what, seconds, SECONDS, "limit", "s", 1, "lower"),
            Row(what, seconds, one_by_one, "reading each version and its kit", "s", 1, "lower"),
        ],
    )


if __name__ == "__main__":
    main()
