// The form of a new job: its recipe is checked and estimated while it is written.

import { get, post } from "../api.js";
import { fill, h } from "../dom.js";
import { bytes, duration } from "../format.js";
import { field, heading, trouble } from "../parts.js";

const PAUSE_MS = 350;

export async function fresh(main, { signal, query, go }) {
  const [recipes, models] = await Promise.all([get("/v1/recipes", {}, signal), get("/v1/models", { limit: 200 }, signal)]);
  const ready = models.items.filter((item) => item.state === "ready");
  const model = h("select", { required: true },
    h("option", { value: "" }, ready.length ? "Choose a model…" : "No model is ready yet"),
    ready.map((item) => h("option", { value: item.id, selected: item.id === query.get("model") || item.name === query.get("model") }, `${item.name} · ${item.architecture ?? ""} · ${bytes(item.size)}`)));
  const recipe = h("select", {}, recipes.items.map((item) => h("option", { value: item.name }, `${item.name} — ${item.description}`)), h("option", { value: "" }, "My own recipe"));
  const source = h("textarea", { rows: 16, spellcheck: "false", class: "code", autocapitalize: "off" });
  const name = h("input", { maxlength: 200, placeholder: "optional" });
  const priority = h("input", { type: "number", min: -100, max: 100, value: 0 });
  const labels = h("input", { placeholder: "team=search env=nightly" });
  const after = h("input", { type: "datetime-local" });
  const plan = h("div", { class: "plan", "aria-live": "polite" });
  const fault = h("div");
  const submit = h("button", { class: "primary", disabled: true }, "Submit");
  const form = h("form", { class: "columns" },
    h("div", {},
      field("Model", model, h("a", { href: "#/models" }, "Add a model")),
      field("Recipe", recipe, "Choose a recipe. You can change it below."),
      field("Recipe in full", source, "YAML or JSON. It is checked as you type."),
      h("details", {}, h("summary", {}, "Name, priority, labels, time"),
        field("Name", name), field("Priority", priority, "From −100 to 100; higher goes first."), field("Labels", labels, "name=value, separated by spaces."), field("Not before", after, "In your own time zone."))),
    h("div", {}, h("h2", {}, "What it will do"), plan, fault, h("p", {}, submit)));
  fill(main, heading("New job"), form);

  const take = () => {
    const chosen = recipes.items.find((item) => item.name === recipe.value);
    source.value = chosen ? chosen.text : "name: mine\npasses:\n  - {pass: weight-only, bits: 8}\nexports: [compressed-tensors]\n";
  };
  let timer;
  let turn = 0;
  const check = () => {
    clearTimeout(timer);
    timer = setTimeout(async () => {
      const mine = ++turn;
      try {
        const answer = await post("/v1/recipes/validate", { recipe: source.value, ...(model.value ? { model: model.value } : {}) });
        if (mine !== turn || signal.aborted) return;
        fill(plan, drawPlan(answer.plan, Boolean(model.value)));
        source.setAttribute("aria-invalid", "false");
        submit.disabled = !model.value;
      } catch (error) {
        if (mine !== turn || signal.aborted) return;
        fill(plan, trouble(error));
        source.setAttribute("aria-invalid", "true");
        submit.disabled = true;
      }
    }, PAUSE_MS);
  };
  recipe.addEventListener("change", () => {
    take();
    check();
  });
  source.addEventListener("input", check);
  model.addEventListener("change", check);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    submit.disabled = true;
    try {
      const parsed = (await post("/v1/recipes/validate", { recipe: source.value, model: model.value })).plan.recipe;
      const job = await post("/v1/jobs", {
        model: model.value,
        recipe: parsed,
        name: name.value.trim(),
        priority: Number(priority.value),
        labels: Object.fromEntries(labels.value.split(/\s+/).filter(Boolean).map((pair) => [pair.split("=")[0], pair.split("=").slice(1).join("=")])),
        ...(after.value ? { run_after: new Date(after.value).toISOString() } : {}),
      });
      go(`#/jobs/${job.id}`);
    } catch (error) {
      fill(fault, trouble(error));
      submit.disabled = false;
    }
  });
  if (query.get("recipe")) recipe.value = query.get("recipe");
  take();
  check();
}

function drawPlan(plan, withModel) {
  return [
    h("ol", {}, plan.steps.map((step) => h("li", {}, h("strong", {}, step.name), " ", h("span", { class: "quiet" }, step.detail)))),
    plan.estimate
      ? h("dl", {},
          h("dt", {}, "Queue"), h("dd", {}, `${plan.queue}: ${plan.queue_reason}`),
          h("dt", {}, "Memory"), h("dd", {}, bytes(plan.estimate.memory_bytes)),
          h("dt", {}, "Time"), h("dd", {}, `about ${duration(plan.estimate.seconds)}`),
          Object.entries(plan.estimate.output_bytes).map(([name, size]) => [h("dt", {}, name), h("dd", {}, bytes(size))]))
      : h("p", { class: "quiet" }, withModel ? "" : "Choose a model for an estimate of size, memory and time."),
    plan.warnings.map((warning) => h("p", { class: "notice" }, warning)),
  ];
}
