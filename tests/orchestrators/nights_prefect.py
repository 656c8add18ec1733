"""A flow that presses twice, for test_orchestrators.py. It prints what each job gave."""

import asyncio
import json
import os
import sys
from typing import Any

from prefect import flow

from nightpress.client.outcomes import GateMissedError
from nightpress.client.prefect import NightpressJob, NightpressService


@flow
async def nights() -> list[dict[str, Any]]:
    service = NightpressService(api_url=os.environ["ADDRESS"], api_key=os.environ["KEY"])
    await service.save("nights", overwrite=True)
    found: list[dict[str, Any]] = []
    for bound in ("<= 60%", "<= 1%"):
        job = NightpressJob(
            service=await NightpressService.load("nights"),
            model="tiny",
            recipe=json.loads(os.environ["RECIPE"]),
            gates={"size": bound},
            labels={"by": "prefect"},
            poll_s=0.1,
        )
        run = await job.trigger()
        await run.wait_for_completion()
        try:
            ended = await run.fetch_result()
            found.append({"id": ended.id, "verdict": ended.verdict})
        except GateMissedError as error:
            found.append({"id": run.job_id, "error": str(error)})
    return found


if __name__ == "__main__":
    for outcome in asyncio.run(nights()):
        sys.stdout.write(json.dumps(outcome) + "\n")
