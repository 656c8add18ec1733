"""Costs on the wire: of attempts, jobs, studies and schedules, and what an artifact saves. Money is in the operator's currency."""

from typing import Literal

from pydantic import Field

from nightpress.core.wire.base import View


class CostView(View):
    """What something has cost until now, by the operator's prices: all attempts, also those that failed."""

    amount: float
    currency: str


class AttemptCostView(View):
    number: int
    worker_id: str
    device: str | None  #: the name of its GPUs, if it is known
    gpus: int = 0  #: the GPUs that it held; 0 on the queue `cpu`. Each costs its price for all of `seconds`
    seconds: float
    amount: float
    ended: bool


class DayView(View):
    day: str  #: e.g. 2026-11-29, in UTC
    amount: float


class SpendingView(View):
    """What a tenant has spent, newest day first. `currency` is empty where the operator has set no prices."""

    currency: str
    days: list[DayView]


class SavingView(View):
    """The price of a million tokens with the source and with an artifact, at one measured shape."""

    artifact: str
    what: Literal["served", "decode", "forward"] = Field(
        description="Tokens that vLLM wrote for many requests, tokens written one after another, or tokens read in a forward pass."
    )
    shape: str
    device: str
    price_per_hour: float
    source_tokens_per_s: float
    tokens_per_s: float
    source_per_million: float
    per_million: float
    saved_per_million: float  #: below 0: the artifact is slower
    pays_back_after: float | None = Field(
        description="Tokens after which the saving equals the job's cost; null: never."
    )


class JobCostView(View):
    """What a job has cost, attempt by attempt, and what its artifacts save. `currency` is empty where the operator has set no prices."""

    job_id: str
    currency: str
    amount: float
    attempts: list[AttemptCostView]
    savings: list[SavingView]
