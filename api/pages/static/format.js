// Numbers, times and sizes as text.

const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  let unit = 0;
  while (count >= 1000 && unit < UNITS.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? count : count.toPrecision(3)} ${UNITS[unit]}`;
}

/** Money, e.g. of `{ amount, currency }`. Small amounts have more digits. */
export function money(cost) {
  if (!cost?.currency) return null;
  return `${cost.amount >= 1 || cost.amount === 0 ? cost.amount.toFixed(2) : cost.amount.toPrecision(3)} ${cost.currency}`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds > 0 && seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds < 10 && !Number.isInteger(seconds) ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(seconds % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} days`;
}

export function since(iso, now = Date.now()) {
  return (now - Date.parse(iso)) / 1000;
}

export function age(iso) {
  const seconds = since(iso);
  if (seconds < 0) return `in ${duration(Math.round(-seconds))}`;
  return seconds < 5 ? "just now" : `${duration(Math.round(seconds))} ago`;
}

const MOMENT = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

export function moment(iso) {
  return iso ? MOMENT.format(new Date(iso)) : "–";
}

export function count(number) {
  if (number === null || number === undefined) return "–";
  if (number >= 1e9) return `${(number / 1e9).toPrecision(3)} B`;
  if (number >= 1e6) return `${(number / 1e6).toPrecision(3)} M`;
  return number.toLocaleString();
}

export function figure(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && size < 0.001) return value.toExponential(2);
  return size >= 1000 ? Math.round(value).toLocaleString() : String(Number(value.toPrecision(4)));
}

export function percent(share, digits = 0) {
  return share === null || share === undefined ? "–" : `${(share * 100).toFixed(digits)}%`;
}

export function change(share) {
  if (share === null || share === undefined) return "";
  return `${share >= 0 ? "+" : "−"}${Math.abs(share * 100).toPrecision(2)}%`;
}

export function words(name) {
  return String(name).replaceAll("_", " ");
}
