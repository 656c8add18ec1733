// Requests to the API: each carries the key or the session's cookie, and an error becomes a Refused with the problem of the answer.

const KEY = "nightpress.key";

export class Refused extends Error {
  constructor(problem) {
    super(problem.detail || problem.title || "The server refused.");
    this.problem = problem;
    this.hint = problem.hint || "";
    this.status = problem.status;
  }
}

export function key() {
  return sessionStorage.getItem(KEY) || localStorage.getItem(KEY);
}

export function keep(value, onThisDevice) {
  forget();
  (onThisDevice ? localStorage : sessionStorage).setItem(KEY, value);
}

/** Replace the key, in the storage that holds the old key. */
export function replace(value) {
  keep(value, localStorage.getItem(KEY) !== null);
}

/** The token that proves to the server that a request comes from this page. There is one while somebody is signed in by a session. */
function csrf() {
  return document.cookie.match(/(?:^|; )(?:__Host-)?nightpress_csrf=([0-9a-f]+)/)?.[1] ?? "";
}

export function signedIn() {
  return Boolean(key() || csrf());
}

/** End the session and forget the key. */
export async function signOut() {
  const token = csrf();
  forget();
  if (token) await fetch("/auth/sign-out", { method: "POST", headers: { "X-CSRF-Token": token } });
}

export function forget() {
  sessionStorage.removeItem(KEY);
  localStorage.removeItem(KEY);
  for (const prefix of ["", "__Host-"]) document.cookie = `${prefix}nightpress_csrf=; Path=/; Max-Age=0; SameSite=Strict${prefix && "; Secure"}`;
}

async function send(method, path, { body, headers = {}, signal, query } = {}) {
  const search = query ? `?${new URLSearchParams(Object.entries(query).flatMap(([name, value]) => pairs(name, value)))}` : "";
  let response;
  try {
    response = await fetch(path + search, {
      method,
      signal,
      headers: {
        ...(key() ? { Authorization: `Bearer ${key()}` } : { "X-CSRF-Token": csrf() }),
        ...(body === undefined ? {} : { "Content-Type": "application/json" }),
        ...headers,
      },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused({ title: "No answer", status: 0, detail: "The server doesn't answer.", hint: "Check that it runs. The page tries again by itself." });
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({ detail: `The server answered ${response.status}.`, status: response.status }));
  if (response.status === 401) window.dispatchEvent(new Event("signed-out"));
  throw new Refused(problem);
}

function pairs(name, value) {
  if (value === null || value === undefined || value === "") return [];
  return Array.isArray(value) ? value.map((item) => [name, item]) : [[name, value]];
}

async function answer(response) {
  return response.status === 204 ? null : response.json();
}

export async function get(path, query, signal) {
  return answer(await send("GET", path, { query, signal }));
}

/** Each POST has an Idempotency-Key of its own: sent again after a lost answer, it does nothing twice. */
export async function post(path, body = undefined, headers = {}) {
  return answer(await send("POST", path, { body, headers: { "Idempotency-Key": crypto.randomUUID?.() ?? String(Math.random()), ...headers } }));
}

/** Change what has this version. If somebody has changed it since, the server refuses. */
export async function change(method, path, body, version) {
  return answer(await send(method, path, { body, headers: version ? { "If-Match": `"v${version}"` } : {} }));
}

export async function text(path) {
  return (await send("GET", path)).text();
}

/** Save a file from the server. Where the storage can sign an address, the browser fetches the file from there. */
export async function download(path, name) {
  const response = await send("GET", path, { headers: { Accept: "application/vnd.nightpress.location+json, */*;q=0.5" } });
  let address;
  if ((response.headers.get("content-type") || "").startsWith("application/vnd.nightpress.location+json")) {
    address = (await response.json()).url;
  } else {
    address = URL.createObjectURL(await response.blob());
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  }
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
}

/** Read server-sent events with a key, which EventSource can't send. Calls `each(id, kind, data)`. Reconnects until the stream ends or `signal` aborts. */
export async function stream(path, after, each, signal) {
  let last = after;
  let pause = 500;
  while (!signal.aborted) {
    try {
      const response = await send("GET", path, { signal, headers: { Accept: "text/event-stream", "Last-Event-ID": String(last) } });
      if (response.status === 204) return;
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let buffer = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        pause = 500;
        buffer += value;
        const messages = buffer.split("\n\n");
        buffer = messages.pop();
        for (const message of messages) {
          const fields = Object.fromEntries(message.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
          if (fields.id === undefined) continue;
          last = fields.id;
          each(Number(fields.id), fields.event, JSON.parse(fields.data));
        }
      }
    } catch (error) {
      if (signal.aborted || (error instanceof Refused && error.status >= 400 && error.status < 500)) return;
    }
    await new Promise((wake) => setTimeout(wake, pause));
    pause = Math.min(pause * 2, 10_000);
  }
}
