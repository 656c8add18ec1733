// Before and after, from report.json alone: the same figures wherever they are shown.

import { change, figure } from "./format.js";

/** Fidelity compares with the source, which agrees with itself. */
const OF_THE_SOURCE = { cosine: 1, centred_cosine: 1, top1_agreement: 1, label_agreement: 1, kl_divergence: 0, rank_correlation: 1, correlation: 1, mean_error: 0, largest_error: 0, generation_match: 1 };
const LOWER_IS_BETTER = ["kl_divergence", "mean_error", "largest_error"];
const PREFERRED = ["perplexity", "accuracy", "f1", "ndcg", "spearman", "centred_cosine", "cosine", "top1_agreement", "label_agreement", "rank_correlation", "kl_divergence"];

/** The measure that says most of a model's quality, as its report has it. */
export function quality(subject, names = PREFERRED) {
  for (const name of names) {
    const found = subject.measurements.find((one) => one.name === name);
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

/** Points of several reports: {label, size, latency, quality, better, source}. Those that another beats in everything are `dominated`. */
export function points(reports) {
  const all = reports.flatMap(({ job, report }) => {
    const measure = commonMeasure(reports);
    const subjects = [...report.artifacts.map((one) => ({ subject: one, source: false })), { subject: report.source, source: true }];
    return subjects.map(({ subject, source }) => {
      const found = subject.measurements.find((one) => one.name === measure);
      return {
        job, source, format: subject.format, report,
        label: source ? `${report.model.name} (source)` : `${report.recipe.name} · ${subject.format}`,
        size: subject.size_bytes, latency: latency(subject)?.p50_ms ?? null, measure, quality: found?.value ?? (source ? (OF_THE_SOURCE[measure] ?? null) : null), better: found?.better ?? (LOWER_IS_BETTER.includes(measure) ? "lower" : "higher"),
      };
    });
  });
  const distinct = all.filter((one, at) => !one.source || all.findIndex((other) => other.source && other.report.model.digest === one.report.model.digest) === at);
  return distinct.map((one) => ({ ...one, dominated: distinct.some((other) => other !== one && beats(other, one)) }));
}

/** A measure that all artifacts have, the most telling first. */
export function commonMeasure(reports) {
  const sets = reports.flatMap(({ report }) => report.artifacts.map((one) => new Set(one.measurements.map((measure) => measure.name))));
  const shared = [...(sets[0] ?? [])].filter((name) => sets.every((set) => set.has(name)));
  return PREFERRED.find((name) => shared.includes(name)) ?? shared[0] ?? null;
}

/** What lacks a figure that the other has beats nothing, and neither does what is only small and fast. */
function beats(one, other) {
  if (one.quality === null || (one.latency === null && other.latency !== null)) return false;
  const axes = [[one.size, other.size, "lower"], [one.latency, other.latency, "lower"], [one.quality, other.quality, other.better]]
    .filter(([a, b]) => a !== null && b !== null)
    .map(([a, b, better]) => (better === "lower" ? b - a : a - b));
  return axes.length > 0 && axes.every((gain) => gain >= 0) && axes.some((gain) => gain > 0);
}
