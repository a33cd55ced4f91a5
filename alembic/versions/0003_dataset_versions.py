"""Sets of rows that were chosen and are kept, and which of them a training drew its rows from.

Revision ID: 0003
"""

import sqlalchemy as sa

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "regraft_dataset_versions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("origin", sa.JSON(), nullable=False),
        sa.Column("artifact_sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("ready", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("number >= 1", name=op.f("ck_regraft_dataset_versions_number_from_one")),
        sa.CheckConstraint("rows >= 1", name=op.f("ck_regraft_dataset_versions_has_rows")),
        sa.CheckConstraint("length(artifact_sha256) = 64", name=op.f("ck_regraft_dataset_versions_artifact_is_sha256")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_regraft_dataset_versions")),
        sa.UniqueConstraint("name", "number", name=op.f("uq_regraft_dataset_versions_name_number")),
        sqlite_autoincrement=True,
    )
    for column in ("artifact_sha256", "fingerprint"):
        op.create_index(op.f(f"ix_regraft_dataset_versions_{column}"), "regraft_dataset_versions", [column])
    with op.batch_alter_table("regraft_datasets") as table:
        table.add_column(sa.Column("drawn_from_id", sa.Integer(), nullable=True))
        table.create_foreign_key(
            op.f("fk_regraft_datasets_drawn_from_id"), "regraft_dataset_versions", ["drawn_from_id"], ["id"]
        )
        table.create_index(op.f("ix_regraft_datasets_drawn_from_id"), ["drawn_from_id"])


def downgrade() -> None:
    with op.batch_alter_table("regraft_datasets") as table:
        table.drop_index(op.f("ix_regraft_datasets_drawn_from_id"))
        table.drop_constraint(op.f("fk_regraft_datasets_drawn_from_id"), type_="foreignkey")
        table.drop_column("drawn_from_id")
    op.drop_table("regraft_dataset_versions")
