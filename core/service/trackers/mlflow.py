"""MLflow: a job is a run, a trial is a run below its study's, a promoted result is a version of a registered model.

Every request may be repeated. A run is found again by its tag, MLflow takes a point of a curve once, and a version is found by its run.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode

from nightpress.core.service.trackers.tracker import Run, RunDeletedError, RunState, Version
from nightpress.core.settings import Settings

ALIAS = "promoted"  #: of the version that is a model's latest promotion
_SUBJECT = "nightpress.id"
_STATES: dict[RunState, str] = {
    "waiting": "SCHEDULED",
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
}
_MOST_POINTS, _MOST_NAMES = 1000, 100  #: in one request
_LONGEST_PARAM, _LONGEST_TAG = 6000, 5000
_TIMEOUT_S = 10
_NOT_ALLOWED = re.compile(r"[^\w.\-: /]+")

Item = TypeVar("Item")


class MlflowTracker:
    """Tells an MLflow server."""

    name = "mlflow"

    def __init__(self, settings: Settings) -> None:
        # MLflow's client reads these from the environment at each request, and takes them in no other way.
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(_TIMEOUT_S)
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
        os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] = "false"
        if settings.mlflow_token is not None:
            os.environ["MLFLOW_TRACKING_TOKEN"] = settings.mlflow_token.get_secret_value()
        self._url = settings.mlflow_url.rstrip("/")
        self._experiment = settings.tracker_project
        self._client = MlflowClient(tracking_uri=self._url, registry_uri=self._url)
        self._experiments: dict[str, str] = {}

    def begin(self, run: Run, parent: str | None) -> str:
        experiment = self._experiment_of(run.tenant_id)
        query = f"tags.`{_SUBJECT}` = '{run.subject}'"
        found = self._client.search_runs([experiment], query, run_view_type=ViewType.ALL, max_results=1)
        if found:
            return str(found[0].info.run_id)
        tags = {_SUBJECT: run.subject, "nightpress.tenant": run.tenant_id}
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        made = self._client.create_run(experiment, start_time=_ms(run.started_at), tags=tags, run_name=run.name)
        return str(made.info.run_id)

    def tell(self, run_id: str, run: Run, check: Callable[[], None]) -> None:
        check()
        try:
            known = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise RunDeletedError from error
            raise
        if known.info.lifecycle_stage == "deleted":
            raise RunDeletedError
        params = [Param(_key(name), value[:_LONGEST_PARAM]) for name, value in run.params.items()]
        missing = [param for param in params if param.key not in known.data.params]
        tags = [RunTag(_key(f"nightpress.{name}"), value[:_LONGEST_TAG]) for name, value in run.tags.items()]
        points = [Metric(_key(point.name), point.value, _ms(point.at), point.step) for point in run.points]
        batches: list[dict[str, Any]] = [{"params": batch} for batch in _batches(missing, _MOST_NAMES)]
        batches += [{"tags": batch} for batch in _batches(tags, _MOST_NAMES)]
        batches += [{"metrics": batch} for batch in _batches(points, _MOST_POINTS)]
        for batch in batches:
            check()
            self._client.log_batch(run_id, **batch)
        for name, text in run.files.items():
            check()
            self._client.log_text(run_id, text, name)
        if run.version is not None:
            self._register(run_id, str(known.info.artifact_uri), run.version, check)
        check()
        if run.ended_at is not None:
            self._client.set_terminated(run_id, _STATES[run.state], _ms(run.ended_at))
        elif known.info.status != _STATES[run.state]:
            self._client.update_run(run_id, RunStatus.to_string(RunStatus.from_string(_STATES[run.state])))

    def address(self, run: Run, run_id: str) -> str:
        return f"{self._url}/#/experiments/{self._experiment_of(run.tenant_id)}/runs/{run_id}"

    def _experiment_of(self, tenant_id: str) -> str:
        """The id of a tenant's experiment, which is made if there is none."""
        if tenant_id not in self._experiments:
            name = f"{self._experiment}/{tenant_id}"
            found = self._client.get_experiment_by_name(name)
            if found is None:
                try:
                    self._experiments[tenant_id] = str(self._client.create_experiment(name))
                except MlflowException as error:
                    if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                        raise
                    found = self._client.get_experiment_by_name(name)  # another process was faster
            if found is not None:
                self._experiments[tenant_id] = str(found.experiment_id)
        return self._experiments[tenant_id]

    def _register(self, run_id: str, artifact_uri: str, version: Version, check: Callable[[], None]) -> None:
        """Make the run's version of the registered model, if there is none, and let the alias follow the promotion."""
        model = _key(version.model).replace("/", "-").replace(":", "-")
        check()
        try:
            self._client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        check()
        found = self._client.search_model_versions(f"name = '{model}' and run_id = '{run_id}'", max_results=1)
        if found:
            number = found[0].version
        else:
            check()
            source = version.source or artifact_uri
            made = self._client.create_model_version(model, source, run_id, description=version.description)
            number = made.version
        if version.current:
            check()
            self._client.set_registered_model_alias(model, ALIAS, str(number))


def _key(name: str) -> str:
    """The name with what MLflow does not allow in keys replaced, at most 250 characters."""
    return _NOT_ALLOWED.sub("_", name)[:250]


def _ms(at: Any) -> int:
    return int(at.timestamp() * 1000)


def _batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
