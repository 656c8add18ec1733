"""What a job has cost, and what its artifacts save."""

from nightpress.core.handoff.report import read_report
from nightpress.core.service.costs.ledger import CostLedger
from nightpress.core.service.costs.prices import MICROS
from nightpress.core.service.costs.savings import savings_of
from nightpress.core.service.jobs.queries import JobReader
from nightpress.core.wire.costs import AttemptCostView, JobCostView


def cost_of(ledger: CostLedger, reader: JobReader, job_id: str) -> JobCostView:
    """All attempts of a job with their costs. Without prices, everything costs nothing and nothing is saved."""
    attempts = [
        AttemptCostView(
            number=attempt.number,
            worker_id=attempt.worker_id,
            device=attempt.device,
            gpus=attempt.gpus,
            seconds=attempt.seconds,
            amount=attempt.micros / MICROS,
            ended=attempt.ended,
        )
        for attempt in ledger.attempts(job_id)
    ]
    amount = sum(attempt.amount for attempt in attempts)
    report = reader.report(job_id) if ledger.prices else None
    savings = [] if report is None else savings_of(read_report(report), ledger.prices, cost=amount)
    currency = ledger.prices.currency if ledger.prices else ""
    return JobCostView(job_id=job_id, currency=currency, amount=amount, attempts=attempts, savings=savings)
