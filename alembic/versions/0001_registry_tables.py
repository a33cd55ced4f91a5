"""The registry's tables, and the triggers that keep what must not change.

Revision ID: 0001
"""

import sqlalchemy as sa

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

KEPT = "('ready', 'retired')"
CHANGES_WHAT_IS_KEPT = f"""OLD.state = 'failed' AND NEW.state <> 'failed'
    OR OLD.state IN {KEPT} AND (
        NEW.state NOT IN {KEPT} OR NEW.artifact_sha256 <> OLD.artifact_sha256 OR NEW.size_bytes <> OLD.size_bytes
        OR NEW.uid <> OLD.uid OR NEW.adapter_id <> OLD.adapter_id OR NEW.number <> OLD.number
        OR NEW.base_model_id <> OLD.base_model_id)"""
REFUSALS = [  # trigger, event, table, condition, message
    ("regraft_promotions_no_update", "UPDATE", "regraft_promotions", None, "promotions are append-only"),
    ("regraft_promotions_no_delete", "DELETE", "regraft_promotions", None, "promotions are append-only"),
    ("regraft_versions_kept", "UPDATE", "regraft_versions", CHANGES_WHAT_IS_KEPT, "a registered version is immutable"),
    ("regraft_versions_no_delete", "DELETE", "regraft_versions", None, "version numbers are never used again"),
    ("regraft_aliases_no_delete", "DELETE", "regraft_aliases", None, "an alias always points at a version"),
]


def upgrade() -> None:
    op.create_table(
        "regraft_adapters",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("task", sa.String(length=255), nullable=True),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_regraft_adapters")),
        sa.UniqueConstraint("name", name=op.f("uq_regraft_adapters_name")),
    )
    op.create_table(
        "regraft_base_models",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("reference", sa.Text(), nullable=False),
        sa.Column("identity_sha256", sa.String(length=64), nullable=False),
        sa.Column("family", sa.String(length=63), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("revision", sa.String(length=255), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deprecated_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("successor_id", sa.Integer(), nullable=True),
        sa.CheckConstraint("length(identity_sha256) = 64", name=op.f("ck_regraft_base_models_identity_is_sha256")),
        sa.CheckConstraint("parameters > 0", name=op.f("ck_regraft_base_models_has_parameters")),
        sa.CheckConstraint("successor_id <> id", name=op.f("ck_regraft_base_models_not_its_own_successor")),
        sa.ForeignKeyConstraint(
            ["successor_id"], ["regraft_base_models.id"], name=op.f("fk_regraft_base_models_successor_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_regraft_base_models")),
        sa.UniqueConstraint("identity_sha256", name=op.f("uq_regraft_base_models_identity_sha256")),
        sa.UniqueConstraint("name", name=op.f("uq_regraft_base_models_name")),
    )
    op.create_table(
        "regraft_datasets",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("origin", sa.JSON(), nullable=False),
        sa.CheckConstraint("rows >= 0", name=op.f("ck_regraft_datasets_counts_rows")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_regraft_datasets")),
        sa.UniqueConstraint("name", "fingerprint", name=op.f("uq_regraft_datasets_name_fingerprint")),
    )
    op.create_index(op.f("ix_regraft_datasets_fingerprint"), "regraft_datasets", ["fingerprint"], unique=False)
    op.create_table(
        "regraft_journal",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=31), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column(
            "state",
            sa.Enum("open", "done", "undone", name="state", native_enum=False, create_constraint=True, length=16),
            nullable=False,
        ),
        sa.Column("owner", sa.String(length=255), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_regraft_journal")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_regraft_journal_state"), "regraft_journal", ["state"], unique=False)
    op.create_table(
        "regraft_versions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("uid", sa.String(length=32), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("base_model_id", sa.Integer(), nullable=False),
        sa.Column("dataset_id", sa.Integer(), nullable=True),
        sa.Column("method", sa.String(length=63), nullable=False),
        sa.Column("recipe", sa.JSON(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("artifact_sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("trainable_parameters", sa.BigInteger(), nullable=False),
        sa.Column("mlflow_run_id", sa.String(length=64), nullable=True),
        sa.Column("mlflow_version", sa.Integer(), nullable=True),
        sa.Column(
            "state",
            sa.Enum(
                "pending",
                "ready",
                "failed",
                "retired",
                name="state",
                native_enum=False,
                create_constraint=True,
                length=16,
            ),
            nullable=False,
        ),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "state <> 'failed' OR failure IS NOT NULL", name=op.f("ck_regraft_versions_failure_has_a_reason")
        ),
        sa.CheckConstraint(
            "state NOT IN ('ready', 'retired') OR mlflow_version IS NOT NULL",
            name=op.f("ck_regraft_versions_ready_is_in_mlflow"),
        ),
        sa.CheckConstraint("length(artifact_sha256) = 64", name=op.f("ck_regraft_versions_artifact_is_sha256")),
        sa.CheckConstraint("number >= 1", name=op.f("ck_regraft_versions_number_from_one")),
        sa.CheckConstraint("trainable_parameters >= 0", name=op.f("ck_regraft_versions_counts_parameters")),
        sa.ForeignKeyConstraint(["adapter_id"], ["regraft_adapters.id"], name=op.f("fk_regraft_versions_adapter_id")),
        sa.ForeignKeyConstraint(
            ["base_model_id"], ["regraft_base_models.id"], name=op.f("fk_regraft_versions_base_model_id")
        ),
        sa.ForeignKeyConstraint(["dataset_id"], ["regraft_datasets.id"], name=op.f("fk_regraft_versions_dataset_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_regraft_versions")),
        sa.UniqueConstraint("adapter_id", "number", name=op.f("uq_regraft_versions_adapter_id_number")),
        sa.UniqueConstraint("id", "adapter_id", name=op.f("uq_regraft_versions_id_adapter_id")),
        sa.UniqueConstraint("uid", name=op.f("uq_regraft_versions_uid")),
    )
    op.create_index(op.f("ix_regraft_versions_artifact_sha256"), "regraft_versions", ["artifact_sha256"], unique=False)
    op.create_index(op.f("ix_regraft_versions_base_model_id"), "regraft_versions", ["base_model_id"], unique=False)
    op.create_index(op.f("ix_regraft_versions_state"), "regraft_versions", ["state"], unique=False)
    op.create_table(
        "regraft_aliases",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("alias", sa.String(length=63), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("moved_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("generation >= 1", name=op.f("ck_regraft_aliases_generation_from_one")),
        sa.ForeignKeyConstraint(["adapter_id"], ["regraft_adapters.id"], name=op.f("fk_regraft_aliases_adapter_id")),
        sa.ForeignKeyConstraint(
            ["version_id", "adapter_id"],
            ["regraft_versions.id", "regraft_versions.adapter_id"],
            name=op.f("fk_regraft_aliases_version_id_adapter_id"),
        ),
        sa.PrimaryKeyConstraint("adapter_id", "alias", name=op.f("pk_regraft_aliases")),
    )
    op.create_index("ix_regraft_aliases_version_id", "regraft_aliases", ["version_id"], unique=False)
    op.create_table(
        "regraft_evaluations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("suite", sa.String(length=255), nullable=False),
        sa.Column("metric", sa.String(length=63), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("unit", sa.String(length=31), nullable=True),
        sa.Column("stderr", sa.Double(), nullable=True),
        sa.Column("low", sa.Double(), nullable=True),
        sa.Column("high", sa.Double(), nullable=True),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("dataset_fingerprint", sa.String(length=64), nullable=True),
        sa.Column("outcomes", sa.JSON(), nullable=True),
        sa.Column("flow_run_id", sa.String(length=64), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "low IS NULL OR high IS NULL OR low <= high", name=op.f("ck_regraft_evaluations_interval_in_order")
        ),
        sa.CheckConstraint("samples >= 0", name=op.f("ck_regraft_evaluations_counts_samples")),
        sa.ForeignKeyConstraint(
            ["version_id"], ["regraft_versions.id"], name=op.f("fk_regraft_evaluations_version_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_regraft_evaluations")),
    )
    op.create_index(
        "ix_regraft_evaluations_version_id", "regraft_evaluations", ["version_id", "suite", "metric"], unique=False
    )
    op.create_table(
        "regraft_lineage",
        sa.Column("child_id", sa.Integer(), nullable=False),
        sa.Column("parent_id", sa.Integer(), nullable=False),
        sa.Column("relation", sa.String(length=63), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.CheckConstraint("child_id <> parent_id", name=op.f("ck_regraft_lineage_not_its_own_parent")),
        sa.ForeignKeyConstraint(["child_id"], ["regraft_versions.id"], name=op.f("fk_regraft_lineage_child_id")),
        sa.ForeignKeyConstraint(["parent_id"], ["regraft_versions.id"], name=op.f("fk_regraft_lineage_parent_id")),
        sa.PrimaryKeyConstraint("child_id", "parent_id", "relation", name=op.f("pk_regraft_lineage")),
    )
    op.create_index(op.f("ix_regraft_lineage_parent_id"), "regraft_lineage", ["parent_id"], unique=False)
    op.create_table(
        "regraft_promotions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("alias", sa.String(length=63), nullable=False),
        sa.Column("from_version_id", sa.Integer(), nullable=True),
        sa.Column("to_version_id", sa.Integer(), nullable=False),
        sa.Column(
            "decision",
            sa.Enum(
                "promoted",
                "refused",
                "forced",
                "rolled_back",
                "moved",
                name="decision",
                native_enum=False,
                create_constraint=True,
                length=16,
            ),
            nullable=False,
        ),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "decision <> 'forced' OR (reason IS NOT NULL AND reason <> '')",
            name=op.f("ck_regraft_promotions_force_has_a_reason"),
        ),
        sa.ForeignKeyConstraint(["adapter_id"], ["regraft_adapters.id"], name=op.f("fk_regraft_promotions_adapter_id")),
        sa.ForeignKeyConstraint(
            ["from_version_id"], ["regraft_versions.id"], name=op.f("fk_regraft_promotions_from_version_id")
        ),
        sa.ForeignKeyConstraint(
            ["to_version_id"], ["regraft_versions.id"], name=op.f("fk_regraft_promotions_to_version_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_regraft_promotions")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_regraft_promotions_adapter_id", "regraft_promotions", ["adapter_id", "alias", "id"], unique=False
    )

    refuse = _refuse_on_postgresql if op.get_bind().dialect.name == "postgresql" else _refuse_on_sqlite
    for trigger in REFUSALS:
        refuse(*trigger)


def _refuse_on_sqlite(name: str, event: str, table: str, condition: str | None, message: str) -> None:
    when = f"WHEN {condition}" if condition else ""
    op.execute(f"CREATE TRIGGER {name} BEFORE {event} ON {table} {when} BEGIN SELECT RAISE(ABORT, '{message}'); END")


def _refuse_on_postgresql(name: str, event: str, table: str, condition: str | None, message: str) -> None:
    op.execute(
        """CREATE OR REPLACE FUNCTION regraft_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation'; END $$"""
    )
    when = f"WHEN ({condition})" if condition else ""
    call = f"EXECUTE FUNCTION regraft_refuse('{message}')"
    op.execute(f"CREATE TRIGGER {name} BEFORE {event} ON {table} FOR EACH ROW {when} {call}")
    if event == "DELETE":
        op.execute(f"CREATE TRIGGER {name}_by_truncate BEFORE TRUNCATE ON {table} FOR EACH STATEMENT {call}")


def downgrade() -> None:
    for table in (
        "promotions",
        "lineage",
        "evaluations",
        "aliases",
        "versions",
        "journal",
        "datasets",
        "base_models",
        "adapters",
    ):
        op.drop_table(f"regraft_{table}")  # with its indexes and triggers
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION regraft_refuse()")
