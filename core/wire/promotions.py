"""Promotions on the wire: which job's artifacts a model's name stands for."""

import datetime as dt
from typing import Literal

from pydantic import (
    Field,
)

from nightpress.core.wire.base import Request, View
from nightpress.core.wire.jobs import ArtifactView


class PromotionCreate(Request):
    job_id: str = Field(min_length=1, max_length=40)


class PromotionView(View):
    """The job that a model's name stood for from `created_at` on."""

    id: str
    model_name: str
    model_id: str
    job_id: str
    recipe: str
    cause: Literal["accepted", "manual"]
    created_by: str | None
    created_at: dt.datetime


class LatestView(View):
    """What a model's name means now, and how to fetch it."""

    promotion: PromotionView
    artifacts: list[ArtifactView]
