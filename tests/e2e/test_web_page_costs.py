"""What things cost, on the page in a real browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from nightpress.core.database import db_now, transaction
from nightpress.core.service.tables.jobs import job_attempts
from tests.browser import Browser, signed_in, violations
from tests.face import RECIPE, Face


@pytest.fixture
def priced(tmp_path: Path) -> Iterator[Face]:
    face = Face(tmp_path / "face", prices={"cpu": 36.0}, currency="CHF")
    face.start()
    yield face
    face.close()


@pytest.mark.slow
def test_a_job_and_its_tenant_show_their_cost_and_what_a_million_tokens_cost(
    browser: Browser, priced: Face, bert_tiny: Path
):
    with priced.client() as client:
        client.models.upload(bert_tiny, "mine")
        job = client.jobs.submit("mine", RECIPE).id
        claimed = priced.claim()
        with transaction(priced.engine) as connection:
            connection.execute(update(job_attempts).values(started_at=db_now(-1000)))
        priced.succeed(claimed)
        client.tenants.set_quotas("default", max_cost_month=500)
    with signed_in(browser, priced, f"/jobs/{job}") as seen:
        page = seen.page
        page.wait_for_selector("dt:has-text('Cost') + dd:has-text('10.0')")
        row = page.wait_for_selector("section[aria-labelledby=savings] tbody tr").inner_text()
        assert "compressed-tensors" in row
        assert "1.56 CHF" in row
        assert "−1.56 CHF" in row
        assert "never" in row, "this artifact is slower than its source"
        assert violations(page) == []
        page.click("nav a:has-text('Keys')")
        page.wait_for_selector("dt:has-text('Money a month') + dd:has-text('of 500.00 CHF')")
    assert seen.complaints == []
