// Charts in SVG. Each has a text for screen readers, and every figure in it is also in a table nearby.

import { h } from "./dom.js";
import { figure } from "./format.js";

/** The width of a chart, smaller on a narrow screen so that letters keep their size. */
function span() {
  return matchMedia("(max-width: 46rem)").matches ? 360 : 640;
}

/** Horizontal bars: [{label, value, text, tone}]. */
export function bars(title, items) {
  const largest = Math.max(...items.map((bar) => bar.value), 1e-12);
  const step = 34;
  const width = span();
  const longest = width - 110;
  return h("figure", {},
    h("svg", { viewBox: `0 0 ${width} ${items.length * step + 4}`, role: "img", "aria-label": `${title}: ${items.map((bar) => `${bar.label} ${bar.text}`).join(", ")}`, class: "chart" },
      items.map((bar, at) => h("g", { transform: `translate(0 ${at * step})` },
        h("text", { x: 0, y: 12 }, bar.label),
        h("rect", { x: 0, y: 17, width: Math.max((bar.value / largest) * longest, 1), height: 11, rx: 2, class: bar.tone || "solid" }),
        h("text", { x: Math.max((bar.value / largest) * longest, 1) + 7, y: 27, class: "value" }, bar.text)))),
    h("figcaption", {}, title));
}

/** A scatter plot of points {x, y, label, says, source, dominated}. A point without a label shows `says` under the pointer.
 *  line: points to join; rule: the y of a line across the whole width. */
export function scatter(title, xTitle, yTitle, points, { line = [], rule = null } = {}) {
  const width = span();
  const height = 380;
  const box = { left: 64, right: 20, top: 18, bottom: 46 };
  const scale = (values, from, to) => {
    const low = Math.min(...values);
    const high = Math.max(...values);
    const spare = (high - low || Math.abs(high) || 1) * 0.12;
    return { at: (value) => from + ((value - low + spare) / (high - low + 2 * spare)) * (to - from), ticks: ticks(low - spare, high + spare) };
  };
  const x = scale(points.map((point) => point.x), box.left, width - box.right);
  const y = scale([...points.map((point) => point.y), ...(rule === null ? [] : [rule])], height - box.bottom, box.top);
  return h("figure", {},
    h("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}. ${points.filter((point) => point.label).map((point) => `${point.says ?? point.label}: ${xTitle} ${figure(point.x)}, ${yTitle} ${figure(point.y)}${point.dominated ? ", dominated" : ""}`).join("; ")}`, class: "chart" },
      x.ticks.map((tick) => [h("line", { x1: x.at(tick), x2: x.at(tick), y1: box.top, y2: height - box.bottom, class: "grid" }), h("text", { x: x.at(tick), y: height - box.bottom + 16, class: "value", "text-anchor": "middle" }, figure(tick))]),
      y.ticks.map((tick) => [h("line", { x1: box.left, x2: width - box.right, y1: y.at(tick), y2: y.at(tick), class: "grid" }), h("text", { x: box.left - 8, y: y.at(tick) + 4, class: "value", "text-anchor": "end" }, figure(tick))]),
      h("text", { x: (box.left + width - box.right) / 2, y: height - 8, class: "head", "text-anchor": "middle" }, xTitle),
      h("text", { x: 12, y: (height - box.bottom + box.top) / 2, class: "head", "text-anchor": "middle", transform: `rotate(-90 12 ${(height - box.bottom + box.top) / 2})` }, yTitle),
      rule === null ? null : h("line", { x1: box.left, x2: width - box.right, y1: y.at(rule), y2: y.at(rule), class: "curve curve-3" }),
      line.length > 1 ? h("polyline", { points: line.map((point) => `${x.at(point.x)},${y.at(point.y)}`).join(" "), class: "curve curve-0" }) : null,
      points.map((point) => h("g", { class: point.dominated ? "dominated" : "" },
        h("circle", { cx: x.at(point.x), cy: y.at(point.y), r: point.source ? 5 : 6, class: point.source ? "pale" : "solid" }, h("title", {}, `${point.says ?? point.label}: ${figure(point.x)}, ${figure(point.y)}`)),
        h("text", { x: x.at(point.x) + (x.at(point.x) > width * 0.7 ? -10 : 10), y: y.at(point.y) - 8, "text-anchor": x.at(point.x) > width * 0.7 ? "end" : "start" }, point.label)))),
    h("figcaption", {}, title));
}

/** Curves [{name, x: [], y: []}] with common axes; null where no point is finite. */
export function lines(title, xTitle, curves) {
  const width = span();
  const height = 240;
  const all = curves.flatMap((curve) => curve.x.map((value, at) => [value, curve.y[at]])).filter(([a, b]) => Number.isFinite(a) && Number.isFinite(b));
  if (all.length === 0) return null;
  const [xs, ys] = [all.map(([a]) => a), all.map(([, b]) => b)];
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const x = (value) => 60 + ((value - left) / (right - left || 1)) * (width - 80);
  const y = (value) => height - 36 - ((value - low) / (high - low || 1)) * (height - 56);
  return h("figure", {},
    h("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${curves.map((curve) => `${curve.name} from ${figure(curve.y[0])} to ${figure(curve.y.at(-1))}`).join(", ")}`, class: "chart" },
      ticks(low, high).map((tick) => [h("line", { x1: 60, x2: width - 20, y1: y(tick), y2: y(tick), class: "grid" }), h("text", { x: 52, y: y(tick) + 4, class: "value", "text-anchor": "end" }, figure(tick))]),
      curves.map((curve, at) => [
        h("polyline", { points: curve.x.map((value, index) => `${x(value)},${y(curve.y[index])}`).join(" "), class: `curve curve-${at % 4}` }),
        h("text", { x: 66 + at * (width / 4.3), y: 14, class: `head curve-text-${at % 4}` }, curve.name)]),
      h("text", { x: width / 2, y: height - 6, class: "head", "text-anchor": "middle" }, xTitle)),
    h("figcaption", {}, title));
}

function ticks(low, high) {
  const rough = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((multiple) => multiple * power).find((multiple) => multiple >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) found.push(Number(tick.toPrecision(12)));
  return found;
}
