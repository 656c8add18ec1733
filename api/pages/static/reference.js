// The API's reference from its OpenAPI document: every operation with its parameters, body, examples and answers.

import { fill, h } from "./dom.js";

const main = document.getElementById("main");

function start(api) {
  const byTag = new Map();
  for (const [path, methods] of Object.entries(api.paths))
    for (const [method, operation] of Object.entries(methods)) {
      const tag = operation.tags?.[0] ?? "other";
      if (!byTag.has(tag)) byTag.set(tag, []);
      byTag.get(tag).push({ method: method.toUpperCase(), path, ...operation });
    }
  const tags = [...byTag.keys()];
  fill(document.getElementById("nav"), tags.map((tag) => h("a", { href: `#${idOf(tag)}` }, tag)));
  fill(
    main,
    h("h1", {}, `${api.info.title} ${api.info.version}`),
    prose(api.info.description),
    h("p", {}, h("a", { href: "/openapi.json" }, "openapi.json"), " is the document that this page shows."),
    tags.map((tag) => h("section", { id: idOf(tag) }, h("h2", {}, tag), byTag.get(tag).map((operation) => drawn(api, operation)))),
    h("section", { id: "schemas" }, h("h2", {}, "Schemas"), Object.entries(api.components.schemas).map(([name, definition]) => schema(name, definition))),
  );
  if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
}

function drawn(api, operation) {
  const body = operation.requestBody?.content;
  return h(
    "details",
    { class: "card", id: operation.operationId },
    h("summary", {}, h("strong", {}, operation.method), " ", h("code", {}, operation.path), " ", operation.summary),
    prose(operation.description),
    operation.security ? h("p", { class: "quiet" }, "Needs an API key: ", h("code", {}, "Authorization: Bearer np_…")) : null,
    rows("Parameters", ["name", "in", "type", "meaning"], (operation.parameters ?? []).map((given) => [
      h("code", {}, given.name + (given.required ? " *" : "")), given.in, typeOf(given.schema), given.description ?? given.schema?.description ?? "",
    ])),
    body ? Object.entries(body).map(([media, said]) => [
      h("h3", {}, "Body: ", media, " ", typeOf(said.schema)),
      Object.values(said.examples ?? {}).map((example) => [h("p", {}, example.summary), json(example.value)]),
    ]) : null,
    rows("Answers", ["status", "meaning", "shape"], Object.entries(operation.responses).map(([status, said]) => [
      h("code", {}, status), said.description, typeOf(Object.values(said.content ?? {})[0]?.schema),
    ])),
  );
}

function schema(name, definition) {
  const required = new Set(definition.required ?? []);
  return h(
    "details",
    { class: "card", id: `schema-${name}` },
    h("summary", {}, h("code", {}, name)),
    prose(definition.description),
    rows("Fields", ["name", "type", "meaning"], Object.entries(definition.properties ?? {}).map(([field, said]) => [
      h("code", {}, field + (required.has(field) ? " *" : "")), typeOf(said), said.description ?? "",
    ])),
    definition.enum ? h("p", {}, definition.enum.join(", ")) : null,
  );
}

/** A type in words, with a link where it has a schema of its own. */
function typeOf(said) {
  if (!said) return "";
  if (said.$ref) {
    const name = said.$ref.split("/").at(-1);
    return h("a", { href: `#schema-${name}`, onclick: () => document.getElementById(`schema-${name}`)?.setAttribute("open", "") }, name);
  }
  if (said.const !== undefined) return h("code", {}, JSON.stringify(said.const));
  if (said.enum) return said.enum.map((value) => JSON.stringify(value)).join(" | ");
  const several = said.anyOf ?? said.oneOf;
  if (several) return several.map((choice, index) => [index ? " | " : "", typeOf(choice)]);
  if (said.type === "array") return ["list of ", typeOf(said.items)];
  return [said.type ?? "anything", said.format ? ` (${said.format})` : "", said.default === undefined ? "" : `, else ${JSON.stringify(said.default)}`];
}

function rows(title, heads, lines) {
  if (!lines.length) return null;
  return [
    h("h3", {}, title),
    h("table", {}, h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, lines.map((cells) => h("tr", {}, cells.map((cell) => h("td", {}, cell)))))),
  ];
}

const prose = (text) => (text ?? "").trim().split(/\n\s*\n/).filter(Boolean).map((paragraph) => h("p", {}, paragraph));
const json = (value) => h("pre", {}, JSON.stringify(value, null, 2));
const idOf = (tag) => `part-${tag.replaceAll(" ", "-")}`;

fetch("/openapi.json")
  .then((answer) => answer.json())
  .then(start)
  .catch(() => fill(main, h("p", { class: "notice bad" }, "openapi.json could not be read. Check that the service runs.")));
