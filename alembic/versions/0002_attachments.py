"""Artifacts that belong to a version beside its own.

Revision ID: 0002
"""

import sqlalchemy as sa

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "regraft_attachments",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("relation", sa.String(length=63), nullable=False),
        sa.Column("artifact_sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("ready", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("length(artifact_sha256) = 64", name=op.f("ck_regraft_attachments_artifact_is_sha256")),
        sa.ForeignKeyConstraint(
            ["version_id"], ["regraft_versions.id"], name=op.f("fk_regraft_attachments_version_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_regraft_attachments")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_regraft_attachments_version_id", "regraft_attachments", ["version_id", "relation"], unique=False
    )
    op.create_index(
        op.f("ix_regraft_attachments_artifact_sha256"), "regraft_attachments", ["artifact_sha256"], unique=False
    )


def downgrade() -> None:
    op.drop_table("regraft_attachments")
