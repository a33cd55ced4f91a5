"""What paired tests of other metrics than accuracy need: a score, or components, for each item.

Revision ID: 0004
"""

import sqlalchemy as sa

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("regraft_evaluations", sa.Column("scores", sa.JSON(), nullable=True))
    op.add_column("regraft_evaluations", sa.Column("components", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("regraft_evaluations", "components")
    op.drop_column("regraft_evaluations", "scores")
