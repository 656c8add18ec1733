// Figures of reports, so that all views show the same figures.

import { change, figure } from "./format.js";

/** The source's own value of figures that compare with the source. */
const OF_THE_SOURCE = { cosine: 1, centred_cosine: 1, top1_agreement: 1, label_agreement: 1, kl_divergence: 0, kl_median: 0, kl_p90: 0, kl_p99: 0, kl_p999: 0, kl_max: 0, rms_dp: 0, flips: 0, right_to_wrong: 0, rank_correlation: 1, correlation: 1, mean_error: 0, largest_error: 0, generation_match: 1 };
const LOWER_IS_BETTER = ["kl_divergence", "kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max", "rms_dp", "flips", "right_to_wrong", "mean_error", "largest_error"];
const PREFERRED = ["perplexity", "accuracy", "f1", "ndcg", "spearman", "centred_cosine", "cosine", "top1_agreement", "label_agreement", "rank_correlation", "kl_divergence"];

/** The measurement of a subject that says most about its quality; null without any. */
export function quality(subject, names = PREFERRED) {
  for (const name of names) {
    const found = subject.measurements.find((measurement) => measurement.name === name);
    if (found) return found;
  }
  return subject.measurements[0] ?? null;
}

export function latency(subject) {
  return subject.timings[0] ?? null;
}

export function interval(measurement) {
  const range = measurement.low === null || measurement.low === undefined ? "" : ` (${figure(measurement.low)} to ${figure(measurement.high)})`;
  return `${figure(measurement.value)}${range}`;
}

export function changed(measurement) {
  if (measurement.change === null || measurement.change === undefined) return "";
  const range = measurement.change_low === null || measurement.change_low === undefined ? "" : ` (${change(measurement.change_low)} to ${change(measurement.change_high)})`;
  return `${change(measurement.change)}${range}`;
}

/** Points of several reports: {label, size, latency, quality, better, source, dominated}. A dominated point is beaten in everything by another. */
export function points(reports) {
  const all = reports.flatMap(({ job, report }) => {
    const measure = commonMeasure(reports);
    const subjects = [...report.artifacts.map((artifact) => ({ subject: artifact, source: false })), { subject: report.source, source: true }];
    return subjects.map(({ subject, source }) => {
      const found = subject.measurements.find((measurement) => measurement.name === measure);
      return {
        job, source, format: subject.format, report,
        label: source ? `${report.model.name} (source)` : `${report.recipe.name} · ${subject.format}`,
        size: subject.size_bytes, latency: latency(subject)?.p50_ms ?? null, measure, quality: found?.value ?? (source ? (OF_THE_SOURCE[measure] ?? null) : null), better: found?.better ?? (LOWER_IS_BETTER.includes(measure) ? "lower" : "higher"),
      };
    });
  });
  const distinct = all.filter((point, at) => !point.source || all.findIndex((other) => other.source && other.report.model.digest === point.report.model.digest) === at);
  return distinct.map((point) => ({ ...point, dominated: distinct.some((other) => other !== point && beats(other, point)) }));
}

/** The name of the preferred measure that all artifacts have. */
export function commonMeasure(reports) {
  const sets = reports.flatMap(({ report }) => report.artifacts.map((artifact) => new Set(artifact.measurements.map((measure) => measure.name))));
  const shared = [...(sets[0] ?? [])].filter((name) => sets.every((set) => set.has(name)));
  return PREFERRED.find((name) => shared.includes(name)) ?? shared[0] ?? null;
}

/** Whether a point is at least as good as another in every figure, and better in at least one. A point without a quality beats nothing. */
function beats(point, other) {
  if (point.quality === null || (point.latency === null && other.latency !== null)) return false;
  const axes = [[point.size, other.size, "lower"], [point.latency, other.latency, "lower"], [point.quality, other.quality, other.better]]
    .filter(([a, b]) => a !== null && b !== null)
    .map(([a, b, better]) => (better === "lower" ? b - a : a - b));
  return axes.length > 0 && axes.every((gain) => gain >= 0) && axes.some((gain) => gain > 0);
}
