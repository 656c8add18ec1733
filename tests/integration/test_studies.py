"""Studies with a real database: what is tried, in which order, what wins, and what happens when processes race or die."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from nightpress.core.database import db_now, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.studies import ledger
from nightpress.core.service.tables.jobs import job_artifacts, job_attempts, jobs
from nightpress.core.service.tables.studies import studies
from nightpress.core.wire.studies import StudyView
from tests.service import ROOT
from tests.studies import GATES, SPACE, TENANT, StudyWorld
from tests.trials import bits_of


@pytest.fixture
def world(tmp_path: Path, sql_url: str, bert_tiny: Path) -> Iterator[StudyWorld]:
    world = StudyWorld(tmp_path, sql_url, bert_tiny)
    yield world
    world.engine.dispose()


@pytest.fixture
def quick(tmp_path: Path, sqlite_url: str, bert_tiny: Path) -> Iterator[StudyWorld]:
    """As `world`, on SQLite alone: for what does not depend on the database."""
    world = StudyWorld(tmp_path, sqlite_url, bert_tiny)
    yield world
    world.engine.dispose()


def told(world: StudyWorld, study: StudyView) -> list[tuple[int, dict[str, Any]]]:
    return [(trial.number, trial.choices) for trial in world.trials(study) if trial.role == "search"]


@pytest.mark.slow
def test_a_study_finds_the_smallest_that_keeps_its_gates(world: StudyWorld):
    study = world.create(trials=24)
    ended = world.run(study)
    assert (ended.state, ended.verdict, ended.reason) == ("succeeded", "accepted", "trials")
    assert ended.counts == {"kept": ended.counts["kept"], "missed": 24 - ended.counts["kept"]}
    report = world.studies.store.report(TENANT, study.id)
    assert report.winner is not None
    best = min(bits_of(trial.recipe)[0] for trial in world.trials(study) if bits_of(trial.recipe)[1] >= 0.95)
    assert report.winner.goal == pytest.approx(best, rel=1e-4)
    assert report.winner.recipe["passes"][0]["bits"] == 4
    assert report.winner.kept
    assert not report.chosen_again
    assert ended.winner_job_id == report.winner.job_id
    assert report.runner_up is not None
    assert report.runner_up.goal < report.winner.goal
    assert report.runner_up.gain == pytest.approx(1 - report.runner_up.goal / best, rel=1e-3)
    assert [gate.gate for gate in report.runner_up.misses] == ["cosine >= 0.95"]
    bits = next(entry for entry in report.sensitivity if entry.parameter == "0.passes.0.bits")
    assert bits.share > 0.8
    assert sum(report.counts.values()) == 24


@pytest.mark.slow
def test_no_recipe_is_tried_twice_and_each_trial_has_a_job_of_its_own(world: StudyWorld):
    study = world.create(trials=12, parallel=4)
    world.run(study, order=3)
    trials = [trial for trial in world.trials(study) if trial.role == "search"]
    assert [trial.number for trial in trials] == list(range(12))
    assert len({trial.job_id for trial in trials}) == 12
    assert len({str(trial.recipe) for trial in trials}) == 12
    for trial in trials:
        assert trial.job_id is not None
        job = world.store.reader.get(TENANT, trial.job_id)
        assert job is not None
        assert (job.study_id, job.promote) == (study.id, False)
        assert [entry["part"] for entry in job.recipe["evaluate"]] == ["choose"]


@pytest.mark.slow
def test_the_same_seed_and_answers_give_the_same_trials_in_whatever_order_they_end(quick: StudyWorld):
    def salted(study: int) -> Any:
        return [{**SPACE[0], "seed": study}]  # another seed of the recipe: no job is reused

    first, second = (quick.create(trials=16, parallel=4, seed=7, space=salted(at)) for at in (1, 2))
    ended = [quick.run(first, order=1), quick.run(second, order=2, replicas=3)]
    assert told(quick, first) == told(quick, second)
    winners = [quick.studies.store.report(TENANT, study.id).winner for study in ended]
    assert winners[0] is not None
    assert winners[1] is not None
    assert winners[0].recipe == winners[1].recipe
    other = quick.create(trials=16, parallel=4, seed=8, space=salted(3))
    quick.run(other)
    assert told(quick, other) != told(quick, first)


@pytest.mark.slow
def test_the_last_measurement_uses_the_other_half_and_decides_who_wins(quick: StudyWorld):
    def flattered(recipe: dict[str, Any]) -> tuple[float, float]:
        """Where a recipe is chosen, 3 bits keep the gate; where it is judged, they don't."""
        size, cosine = bits_of(recipe)
        judged = recipe["evaluate"][0]["part"] == "judge"
        return size, cosine + (0.0 if judged or recipe["passes"][0]["bits"] != 3 else 0.03)

    study = quick.create(trials=30, parallel=4, judge=16)
    ended = quick.run(study, flattered)
    report = quick.studies.store.report(TENANT, study.id)
    assert ended.verdict == "accepted"
    assert report.chosen_again
    assert report.winner is not None
    assert report.winner.recipe["passes"][0]["bits"] == 4
    assert report.front[0].recipe["passes"][0]["bits"] == 3
    assert not report.front[0].kept
    judges = [trial for trial in quick.trials(study) if trial.role == "judge"]
    assert {trial.judges for trial in judges} == {entry.trial for entry in report.front}


@pytest.mark.slow
def test_a_study_in_which_nothing_keeps_the_gates_is_rejected_and_says_what_came_nearest(quick: StudyWorld):
    study = quick.create(trials=6, gates={"cosine": ">= 0.9999"})
    ended = quick.run(study)
    assert (ended.state, ended.verdict, ended.winner_job_id) == ("succeeded", "rejected", None)
    report = quick.studies.store.report(TENANT, study.id)
    assert report.winner is None
    assert report.front == []
    assert report.runner_up is not None
    assert report.reasons == {"missed: cosine >= 0.9999": 6}


def test_a_gate_on_a_slice_is_measured_by_the_metric_of_its_figure(quick: StudyWorld):
    quick.create(trials=1, gates={"masked_accuracy[long texts]": ">= 0.5"})
    with quick.engine.connect() as connection:
        (parts,) = connection.execute(select(studies.c.space)).scalars()
    assert [entry["metric"] for entry in parts["evaluate"]][:1] == ["masked-lm"]


@pytest.mark.slow
def test_replicas_that_race_propose_each_trial_once(world: StudyWorld):
    study = world.create(trials=10, parallel=4)
    ended = world.run(study, replicas=4)
    assert (ended.state, sum(ended.counts.values())) == ("succeeded", 10)
    kinds = [event.kind for event in world.studies.store.events(study.id)]
    assert kinds.count("trial_started") == kinds.count("trial_ended") == ended.proposed == ended.told
    assert [event.seq for event in world.studies.store.events(study.id)] == list(range(1, len(kinds) + 1))


@pytest.mark.slow
def test_a_replica_that_dies_before_its_commit_leaves_nothing(world: StudyWorld, monkeypatch: pytest.MonkeyPatch):
    study = world.create(trials=4, parallel=1)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "_insert", killed)  # after the job's row is written, before the trial's
        with pytest.raises(KeyboardInterrupt):
            world.replica().advance()
    assert world.get(study).proposed == 0
    assert world.store.reader.page(TENANT)[0] == []
    assert world.run(study).state == "succeeded"


@pytest.mark.slow
def test_a_slow_trial_keeps_no_other_from_starting_for_a_round(quick: StudyWorld):
    study = quick.create(trials=20, parallel=3)
    control = quick.replica()
    quick.fill(control)
    quick.claim_all()
    slow = quick.held[0]
    for _ in range(10):
        quick.claim_all()
        for claimed in [claimed for claimed in quick.held if claimed is not slow]:
            quick.end(claimed)
        quick.fill(control)
    assert quick.get(study).proposed == 7  # trial 7 is made from the result of trial 0, and waits for it
    assert [trial.known for trial in quick.trials(study)] == [0] * 7
    quick.end(slow)
    quick.fill(control)
    assert [trial.known for trial in quick.trials(study)[7:]] == [1, 2, 3]


@pytest.mark.slow
def test_cancelling_a_study_ends_its_trials(world: StudyWorld):
    study = world.create(parallel=3)
    control = world.replica()
    world.fill(control)
    world.claim_all()
    control.advance()
    assert world.studies.cancel(TENANT, study.id).state == "cancelling"
    assert world.studies.cancel(TENANT, study.id).state == "cancelling"
    control.advance()
    assert world.get(study).state == "cancelling"  # workers have not confirmed yet
    for claimed in list(world.held):
        assert world.store.attempts.confirm_cancelled(claimed.lease)
    control.advance()
    ended = world.get(study)
    assert (ended.state, ended.reason, ended.verdict) == ("cancelled", "cancelled", None)
    assert ended.counts == {"cancelled": 3}
    assert ended.told == ended.proposed == 3
    control.advance()
    assert world.get(study) == ended


@pytest.mark.slow
def test_budgets_and_the_deadline_end_a_search_and_its_running_trials(quick: StudyWorld):
    spent = quick.create(trials=40, parallel=2, cpu_hours=1.0)
    late = quick.create(trials=40, parallel=2, space=[{**SPACE[0], "seed": 5}])
    control = quick.replica()
    quick.fill(control)
    quick.claim_all()
    assert len(quick.held) == 4
    for study in (spent, late):
        quick.end(next(claimed for claimed in quick.held if claimed.job.study_id == study.id))
    with transaction(quick.engine) as connection:
        connection.execute(update(job_attempts).values(started_at=db_now(-3700)))
        connection.execute(update(studies).where(studies.c.id == late.id).values(deadline_at=db_now(-1)))
    control.advance()
    for claimed in list(quick.held):
        quick.held.remove(claimed)
        assert quick.store.attempts.confirm_cancelled(claimed.lease)
    control.advance()
    assert (quick.get(spent).state, quick.get(spent).reason) == ("judging", "cpu")
    assert (quick.get(late).state, quick.get(late).reason) == ("judging", "deadline")
    assert quick.get(spent).cpu_seconds > 3600
    for study in (spent, late):
        assert quick.run(study).state == "succeeded"


@pytest.mark.slow
def test_a_small_space_is_tried_whole(quick: StudyWorld):
    space = [
        {
            "name": "few",
            "passes": [{"pass": "weight-only", "bits": {"choice": [4, 6, 8]}}],
            "exports": ["compressed-tensors"],
        }
    ]
    study = quick.create(space=space, trials=40)
    ended = quick.run(study, lambda recipe: (recipe["passes"][0]["bits"] / 32, 0.99))
    assert (ended.reason, ended.counts) == ("space", {"kept": 3})
    report = quick.studies.store.report(TENANT, study.id)
    assert report.winner is not None
    assert report.winner.recipe["passes"][0]["bits"] == 4


@pytest.mark.slow
def test_a_study_whose_trials_all_fail_ends_with_their_error(quick: StudyWorld):
    study = quick.create(trials=40, parallel=2)
    control = quick.replica()
    for _ in range(10):
        control.advance()
        quick.claim_all()
        for claimed in list(quick.held):
            quick.fail(claimed)
    ended = quick.get(study)
    assert (ended.state, ended.reason) == ("failed", "failures")
    assert ended.error is not None
    assert "numerical_failure: A weight is not finite." in ended.error["message"]
    assert ended.proposed <= 8


@pytest.mark.slow
def test_a_trial_that_fails_is_told_and_the_search_goes_on(quick: StudyWorld):
    study = quick.create(trials=8, parallel=1)
    control = quick.replica()
    control.advance()
    quick.claim_all()
    quick.fail(quick.held[0])
    ended = quick.run(study)
    assert (ended.state, ended.counts["failed"]) == ("succeeded", 1)
    first = quick.trials(study)[0]
    assert (first.state, first.reason) == ("failed", "numerical_failure: A weight is not finite.")


@pytest.mark.slow
def test_trials_wait_for_the_quota_and_go_on(tmp_path: Path, sqlite_url: str, bert_tiny: Path):
    world = StudyWorld(tmp_path, sqlite_url, bert_tiny, max_queued_jobs=2)
    study = world.create(trials=6, parallel=4)
    world.fill(world.replica())
    assert world.get(study).proposed == 2
    assert world.run(study).counts == {"kept": 6} or sum(world.get(study).counts.values()) == 6
    world.engine.dispose()


@pytest.mark.slow
def test_a_study_can_start_from_the_front_of_another(quick: StudyWorld):
    first = quick.create(trials=12)
    quick.run(first)
    report = quick.studies.store.report(TENANT, first.id)
    second = quick.create(trials=3, parallel=1, start_from=first.id, seed=99)
    ended = quick.run(second)
    assert ended.best is not None
    assert report.winner is not None
    assert quick.trials(second)[0].choices == quick.trials(first)[report.winner.trial].choices
    # The same recipe on the same model and data: the earlier result was taken, and nothing was run.
    assert quick.trials(second)[0].cpu_seconds == 0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model": "other"}, ErrorCode.NOT_FOUND),
        (
            {"space": [{"passes": [{"pass": "weight-only", "bits": {"choice": []}}], "exports": ["onnx"]}]},
            ErrorCode.INVALID_RECIPE,
        ),
        ({"space": [{"passes": [{"pass": "nothing"}], "exports": ["onnx"]}]}, ErrorCode.INVALID_RECIPE),
        ({"space": [{**SPACE[0], "gates": {}}]}, ErrorCode.INVALID_RECIPE),
        ({"evaluate": [{"metric": "perplexity"}]}, ErrorCode.INVALID_RECIPE),
        ({"minimize": "decode", "space": "auto"}, ErrorCode.INVALID_RECIPE),
        ({"target": "cpu-llm", "space": "auto"}, ErrorCode.INVALID_RECIPE),
        ({"start_from": "std_other"}, ErrorCode.NOT_FOUND),
    ],
)
def test_what_can_never_work_is_refused_at_once(quick: StudyWorld, change: dict[str, Any], code: ErrorCode):
    with pytest.raises(NightpressError) as refused:
        quick.create(**change)
    assert refused.value.code is code
    assert quick.studies.store.page(TENANT, cursor=None, limit=10)[0] == []


@pytest.mark.slow
def test_an_automatic_space_of_an_encoder_proposes_only_what_can_work(quick: StudyWorld):
    study = quick.create(space="auto", trials=12, gates=GATES)
    assert study.automatic
    assert {recipe["name"] for recipe in study.space} >= {"static-int8", "dynamic-int8", "rounded"}
    quick.run(study, lambda recipe: (0.01 * len(str(recipe["passes"])) / 10, 0.99))
    names = {trial.choices["recipe"] for trial in quick.trials(study)[: len(study.space)]}
    assert names == {recipe["name"] for recipe in study.space}  # each recipe of the space is tried first, once


@pytest.mark.slow
def test_the_winners_artifacts_outlive_those_of_other_trials_until_the_study_is_forgotten(world: StudyWorld):
    study = world.create(trials=3, parallel=1, promote=False)
    ended = world.run(study, lambda recipe: (recipe["passes"][0]["bits"] / 32, 0.99))
    assert ended.winner_job_id is not None
    year = 366 * 24 * 3600.0
    with transaction(world.engine) as connection:
        for trial in world.trials(study):
            row = {
                "id": f"art_{trial.number}",
                "job_id": trial.job_id,
                "attempt": 1,
                "format": "f",
                "path": "f",
                "size": 1,
            }
            connection.execute(job_artifacts.insert().values(**row, digest="d", consumer="c", files=[]))
        connection.execute(update(jobs).values(finished_at=db_now(-year - 60)))
        connection.execute(update(studies).values(finished_at=db_now(-year - 60)))
    world.resources.retention.prune_artifacts(year)
    left = [
        trial.job_id for trial in world.trials(study) if trial.job_id and world.store.reader.artifacts(trial.job_id)
    ]
    assert left == [ended.winner_job_id]
    assert world.ledger.forget(year) == 1
    with pytest.raises(NightpressError):
        world.get(study)
    world.resources.retention.prune_artifacts(year)
    assert world.store.reader.artifacts(ended.winner_job_id) == []


@pytest.mark.slow
def test_an_accepted_winner_becomes_the_models_latest_and_no_other_trial_does(world: StudyWorld):
    kept = world.create(trials=3, promote=False)
    world.run(kept, lambda _recipe: (0.5, 0.99))
    with pytest.raises(NightpressError):
        world.resources.promotions.latest(TENANT, "tiny")
    ended = world.run(world.create(trials=3, seed=1), lambda _recipe: (0.5, 0.99))
    assert world.resources.promotions.latest(TENANT, "tiny").job_id == ended.winner_job_id


@pytest.mark.slow
def test_only_a_process_that_proposes_trials_imports_the_sampler():
    program = "import sys, nightpress.api.app, nightpress.worker.control; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
def test_ranges_are_proposed_within_their_ends_and_by_their_steps(quick: StudyWorld):
    rounding = {
        "pass": "gptq",
        "bits": {"range": [3, 8], "step": 2},
        "group_size": {"range": [32, 100], "step": 32},
        "damping": {"range": [0.001, 0.5], "log": True},
        "sparsity": {"range": [0.05, 0.52], "step": 0.1, "start": 0.15},
    }
    space = [{"name": "ranges", "passes": [rounding], "exports": ["compressed-tensors"]}]
    study = quick.create(space=space, trials=16, parallel=1)
    ended = quick.run(study, lambda recipe: (recipe["passes"][0]["damping"], 0.99))
    assert ended.state == "succeeded", ended.error
    trials = [trial for trial in quick.trials(study) if trial.role == "search"]
    options = [trial.recipe["passes"][0] for trial in trials]
    assert options[0]["sparsity"] == 0.15
    assert {option["bits"] for option in options} <= {3, 5, 7}
    assert {option["group_size"] for option in options} <= {32, 64}
    assert all(0.001 <= option["damping"] <= 0.5 for option in options)
    assert {round(option["sparsity"], 6) for option in options} <= {0.05, 0.15, 0.25, 0.35, 0.45}
    assert len({option["damping"] for option in options}) > 8


def test_an_unexpected_error_ends_its_study_and_no_other(quick: StudyWorld, monkeypatch: pytest.MonkeyPatch):
    broken = quick.create(trials=2)
    whole = quick.create(trials=2, seed=1)
    control = quick.replica()
    advance = control._advance

    def fails(study: Any) -> None:
        if study.id == broken.id:
            raise ZeroDivisionError
        advance(study)

    monkeypatch.setattr(control, "_advance", fails)
    control.advance()
    found = quick.get(broken)
    assert (found.state, (found.error or {}).get("code")) == ("failed", "internal")
    assert quick.get(whole).proposed > 0
