"""An adapter names the model that it was trained for

Revision ID: 0026
Revises: 0025
"""

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("models") as batch:
        batch.add_column(sa.Column("base_id", sa.String(length=40), nullable=True))
        batch.create_foreign_key(op.f("fk_models_base_id_models"), "models", ["base_id"], ["id"])
        batch.create_index("ix_models_base_id", ["base_id"])


def downgrade() -> None:
    with op.batch_alter_table("models") as batch:
        batch.drop_index("ix_models_base_id")
        batch.drop_constraint(op.f("fk_models_base_id_models"), type_="foreignkey")
        batch.drop_column("base_id")
