"""Every column of the tables of studies: each gets a value of its own, and the test reads it back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nightpress.core.service.studies.records import Ended, Outcome
from nightpress.core.service.tables.studies import studies, study_events, study_trials
from nightpress.core.wire.costs import CostView
from tests.columns import MAPPING, WORDS, Chosen, Rows
from tests.studies import SPACE, TENANT, StudyWorld
from tests.trials import bits_of

COVERED = {studies, study_trials, study_events}
COUNTERS = frozenset({"proposed", "told", "event_seq", "cpu_s", "gpu_s", "winner", "max_judged", "model_name"})
SMALL = frozenset({"number", "known", "judges", "cpu_s", "gpu_s"})
COST = Chosen("<cost>", lambda value: isinstance(value, int) and value > 0)
FIGURE = Chosen("<figure>", lambda value: isinstance(value, float))


@pytest.fixture
def world(tmp_path: Path, sql_url: str, bert_tiny: Path) -> Iterator[StudyWorld]:
    world = StudyWorld(tmp_path, sql_url, bert_tiny, prices={"cpu": 3600.0})
    yield world
    world.engine.dispose()


@pytest.mark.slow
def test_studies_trials_and_events(world: StudyWorld) -> None:
    rows = Rows(world.engine)
    model = world.resources.models.get(TENANT, "tiny")
    study = world.create(
        key_id="key12345",
        name="name-of-the-study",
        target=None,
        trials=3,
        parallel=1,
        judge=11,
        hours=2.0,
        cpu_hours=3.0,
        gpu_hours=4.0,
        max_cost=17.5,
        seed=15,
        priority=16,
        labels={"label": "yes"},
        promote=False,
        calibration={"samples": 7, "length": 32},
    )
    parts: dict[str, Any] = {
        "recipes": SPACE,
        "evaluate": [{"metric": "auto", "data": "builtin:prose", "samples": 64, "length": 128}],
        "screen": True,
        "calibration": {"samples": 7, "length": 32},
    }
    row = {
        "id": study.id,
        "tenant_id": TENANT,
        "name": "name-of-the-study",
        "state": "searching",
        "reason": None,
        "verdict": None,
        "model_id": model.id,
        "model_name": "tiny",
        "model_digest": model.digest,
        "minimize": "size",
        "gates": {"cosine": ">= 0.95"},
        "target": None,
        "space": parts,
        "automatic": False,
        "starts": [dict.fromkeys((f"0.passes.0.{name}" for name in ("bits", "group_size", "symmetric", "ranges")), 0)],
        "seed": 15,
        "parallel": 1,
        "max_trials": 3,
        "max_judged": 11,
        "cpu_limit_s": 3 * 3600.0,
        "gpu_limit_s": 4 * 3600.0,
        "cost_limit": 17.5,
        "deadline_at": rows.after(7200),
        "priority": 16,
        "labels": {"label": "yes"},
        "promote": False,
        "created_by": "key12345",
        "proposed": 0,
        "told": 0,
        "cpu_s": 0.0,
        "gpu_s": 0.0,
        "cost_micros": 0,
        "winner": None,
        "report": None,
        "error": None,
        "event_seq": 1,
        "created_at": rows.now,
        "finished_at": None,
    }
    alike = COUNTERS | {"parallel"}
    rows.check(studies, row, alike=alike)
    event = {"study_id": study.id, "seq": 1, "at": rows.now, "kind": "created", "data": {}}
    rows.check(study_events, event)

    world.replica().advance()
    [opened] = world.trials(study)
    trial = {
        "study_id": study.id,
        "number": 0,
        "role": "search",
        "judges": None,
        "params": row["starts"][0],
        "known": 0,
        "recipe": MAPPING,
        "digest": WORDS,
        "job_id": opened.job_id,
        "state": "open",
        "reason": None,
        "artifact": None,
        "goal": None,
        "goal_low": None,
        "goal_high": None,
        "gates": None,
        "margin": None,
        "cpu_s": 0.0,
        "gpu_s": 0.0,
        "cost_micros": 0,
        "created_at": rows.now,
        "ended_at": None,
    }
    rows.check(study_trials, trial, alike=SMALL)
    said = {"number": 0, "role": "search", "judges": None, "known": 0, "job_id": opened.job_id}
    rows.check(study_events, {**event, "seq": 2, "kind": "trial_started", "data": said}, study_events.c.seq == 2)
    rows.check(studies, {**row, "proposed": 1, "event_seq": 2}, alike=alike)

    world.claim_all()
    [claimed] = world.held
    assert claimed.job.study_id == study.id
    assert (claimed.job.created_by, claimed.job.priority, claimed.job.labels) == ("key12345", 16, {"label": "yes"})
    assert claimed.job.recipe["calibration"]["samples"] == 7
    world.end(claimed)
    world.replica().advance()
    size, cosine = bits_of(claimed.job.recipe)
    assert cosine < 0.95
    ended = {
        "state": "missed",
        "reason": f"cosine >= 0.95: {cosine:.4f} on builtin:prose",
        "artifact": "compressed-tensors",
        "goal": pytest.approx(size, rel=1e-4),
        "gates": [
            {
                "gate": "cosine >= 0.95",
                "observed": pytest.approx(cosine),
                "miss": pytest.approx((0.95 - cosine) / 0.95),
                "explanation": f"{cosine:.4f} on builtin:prose",
            }
        ],
        "margin": pytest.approx((0.95 - cosine) / 0.95),
        "cpu_s": FIGURE,
        "cost_micros": COST,
        "ended_at": rows.now,
    }
    rows.check(study_trials, {**trial, **ended}, study_trials.c.number == 0, alike=SMALL | {"margin"})

    done = world.run(study, lambda _recipe: (0.25, 0.96))
    assert (done.verdict, done.counts) == ("accepted", {"missed": 1, "kept": 2})
    judges = [trial for trial in world.trials(study) if trial.role == "judge"]
    kept = {
        **trial,
        **ended,
        "number": 3,
        "role": "judge",
        "judges": judges[0].judges,
        "params": MAPPING,
        "known": 3,
        "job_id": judges[0].job_id,
        "state": "kept",
        "reason": None,
        "goal": 0.25,
        "gates": Chosen("<figures>", lambda value: isinstance(value, list) and len(value) == 1),
        "margin": FIGURE,
    }
    rows.check(study_trials, kept, study_trials.c.number == 3, alike=SMALL)
    final = {
        "state": "succeeded",
        "reason": "trials",
        "verdict": "accepted",
        "proposed": 5,
        "told": 5,
        "cpu_s": FIGURE,
        "cost_micros": COST,
        "winner": 3,
        "report": MAPPING,
        "event_seq": 13,
        "finished_at": rows.now,
    }
    rows.check(studies, {**row, **final}, alike=alike)
    assert world.store.reader.get(TENANT, str(done.winner_job_id)) is not None


@pytest.mark.slow
def test_a_study_that_failed_and_a_figure_with_an_interval(world: StudyWorld) -> None:
    rows = Rows(world.engine)
    study = world.create(target="cpu-encoder", space="auto", parallel=1)
    world.replica().advance()
    [opened] = world.trials(study)
    ended = Ended(0, "search", {}, opened.job_id, "succeeded", None, cpu_s=21.5, gpu_s=22.5, cost_micros=23_500_000)
    figures = {"gate": "cosine >= 0.95", "observed": 0.5, "miss": 0.45, "explanation": "why"}
    outcome = Outcome("missed", "the reason", "of-the-artifact", 0.31, 0.32, 0.33, [figures], 0.45)
    assert world.ledger.tell(study.id, ended, outcome)
    assert not world.ledger.tell(study.id, ended, outcome)
    [trial] = world.trials(study)
    read = (trial.state, trial.reason, trial.artifact, trial.goal, trial.goal_low, trial.goal_high, trial.margin)
    assert read == ("missed", "the reason", "of-the-artifact", 0.31, 0.32, 0.33, 0.45)
    assert [gate.model_dump() for gate in trial.gates] == [figures]
    assert (trial.cpu_seconds, trial.gpu_seconds) == (21.5, 22.5)
    assert world.get(study).cost == CostView(amount=23.5, currency="EUR")
    active = world.ledger.active()[0]
    assert (active.target, active.cpu_s, active.gpu_s, active.told) == ("cpu-encoder", 21.5, 22.5, 1)
    assert world.ledger.fail(active, {"code": "internal", "message": "what happened"}, "failures")
    assert not world.ledger.fail(active, {"code": "internal", "message": "again"}, "failures")
    failed = world.get(study)
    assert (failed.state, failed.reason, failed.target) == ("failed", "failures", "cpu-encoder")
    assert failed.error == {"code": "internal", "message": "what happened"}
    assert (failed.cpu_seconds, failed.gpu_seconds, failed.verdict) == (21.5, 22.5, None)
    said = {"error": {"code": "internal", "message": "what happened"}}
    event = {"study_id": study.id, "seq": 4, "at": rows.now, "kind": "failed", "data": said}
    rows.check(study_events, event, study_events.c.seq == 4)
