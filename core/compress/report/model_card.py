"""The YAML front matter of a model card, which model hubs read."""

from typing import Any

import yaml

from nightpress.core.compress.export.program import PIPELINES
from nightpress.core.compress.report.figures import metric_name
from nightpress.core.handoff.report import Report
from nightpress.core.recipes.passes import catalog

#: name of a metric → the Hub's name for it, where they differ
_HUB_METRICS = {"spearman": "spearmanr", "pearson": "pearsonr", "entity_f1": "seqeval", "choice_accuracy": "acc_norm"}


def front_matter(report: Report) -> str:
    model = report.model
    front: dict[str, Any] = {
        "license": model.get("license"),
        "license_name": model.get("license_name"),
        "license_link": model.get("license_link"),
        "language": model.get("language"),
        "base_model": model["name"],
        "base_model_relation": _relation(report),
        "datasets": model.get("datasets"),
        "pipeline_tag": PIPELINES.get(str(model.get("task"))),
        "tags": ["nightpress", *(artifact.format for artifact in report.artifacts)],
        "model-index": [{"name": f"{model['name']}-{report.recipe['name']}", "results": _index_results(report)}],
    }
    known = {key: value for key, value in front.items() if value}
    return yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=1000)


def _relation(report: Report) -> str:
    """The Hub's `base_model_relation`. Without a pass that changes weights it is `quantized`: a format such as GGUF rounds them."""
    known = [catalog.pass_type(options["pass"]) for options in report.recipe.get("passes", ())]
    relations = {"finetune" if options is None else options.relation for options in known} - {None}
    return "quantized" if not relations or "quantized" in relations else "finetune"


def _index_results(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "task": {"type": PIPELINES.get(str(report.model.get("task")), "other"), "name": subject.name},
            "dataset": {"name": measurement.data, "type": measurement.data},
            "metrics": [
                {
                    "type": _HUB_METRICS.get(measurement.name, measurement.name),
                    "name": metric_name(measurement),
                    "value": round(measurement.value, 6),
                }
            ],
        }
        for subject in report.artifacts
        for measurement in subject.measurements
    ]
