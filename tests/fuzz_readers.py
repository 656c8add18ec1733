"""Every reader of untrusted input, called with hostile input by tests/fuzz.py."""

import contextlib
import datetime as dt
import gzip
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError
from starlette.requests import Request

from nightpress.api.downloads import _wanted_range
from nightpress.api.sse import resume_point
from nightpress.api.versions import version_of
from nightpress.api.waiting import preferred_wait
from nightpress.core.compress.data.rows import read_records, read_rows
from nightpress.core.compress.data.tokenizer import FastTokenizer
from nightpress.core.compress.lineage import read_lineage
from nightpress.core.errors import NightpressError
from nightpress.core.handoff.attestation import make_statement, private_key_from, read_bundle, sign_statement
from nightpress.core.handoff.manifest import ArtifactEntry, describe_bytes
from nightpress.core.paging import _read_cursor
from nightpress.core.recipes.builtins import builtin_recipes, builtin_text
from nightpress.core.recipes.datafile import examine_data
from nightpress.core.recipes.gates import parse_gate
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.jsonfile import parse_json, walk
from nightpress.core.recipes.models import load_recipe, parse_recipe
from nightpress.core.recipes.plan import make_plan
from nightpress.core.service.deliveries.addresses import check_destinations
from nightpress.core.service.deliveries.stale import files_of_bundle
from nightpress.core.service.schedules.cron import parse_cron
from nightpress.core.service.tables.jobs import jobs
from nightpress.core.service.webhooks.courier import pause_after
from nightpress.core.service.webhooks.outbound import Answer
from nightpress.core.service.webhooks.signing import verify
from nightpress.core.service.webhooks.targets import check_target
from nightpress.core.settings import Settings
from nightpress.core.sources.address import parse_address
from nightpress.core.wire.jobs import JobCreate
from nightpress.core.wire.models import DataSetCreate, ModelCreate
from nightpress.core.wire.recipes import ValidateRequest
from nightpress.core.wire.schedules import ScheduleCreate
from tests.deliveries import report_of
from tests.fuzz_values import any_text, any_value, as_json, mangled, spoiled

SLOW_S = 1.0  #: most seconds of processor time for one input
_NOW = dt.datetime(2026, 11, 28, tzinfo=dt.UTC)

_ROWS = {
    "a.jsonl": b'{"text": "good", "label": "pos"}\n\n{"text": "b\xc3\xa4d \\u2028", "label": 0}\r\n{"text": "", "label": 1}\n',
    "b.jsonl": b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": null}]}\n' * 2,
    "c.jsonl": b'{"tokens": ["a", "b"], "tags": ["O", 1]}\n{"query": "q", "positive": ["p"]}\n',
    "a.csv": b'text,label\n"a, ""b""\nc",1\nd,pos\n,\n',
    "a.txt": b"One line.\n\n\nAnother\r\n\r\n{third}\n",
}


class Readers:
    """One method for each reader. Keeps valid files, from which hostile input is made: random bytes alone would not get far."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._model = model
        self._config = json.loads((model / "config.json").read_text())
        self._header = inspect_model(FolderFiles(model))
        self._tokenizer = (model / "tokenizer.json").read_bytes()
        weights = (model / "model.safetensors").read_bytes()
        self._weights = weights[: 8 + int.from_bytes(weights[:8], "little")] + b"\0" * 64
        table = pa.table({"text": ["one", None, "b\u00e4d"], "label": [1, 0, None]})
        whole = io.BytesIO()
        pq.write_table(table, whole)
        self._parquet = whole.getvalue()
        self._recipes = [
            builtin_recipe.model_dump(mode="json", exclude_unset=True) for builtin_recipe in builtin_recipes().values()
        ]
        self._settings = Settings(
            _env_file=None, source_prefixes=["s3://b/p"], hub_organisations=["acme"], destinations=["s3://b", "oci://h"]
        )
        self._key = private_key_from(bytes(range(64)))
        files = (describe_bytes("model.onnx", b"x"),)
        report = report_of("job_1", [ArtifactEntry(format="onnx", path="onnx", files=files, consumer="x")])
        self._statement = make_statement(report, report.artifacts[0], files, (), engine=None)

    def attempt(self, name: str, dice: Random) -> None:
        """Call one reader once. Lets through every exception that the reader must not raise, and raises AssertionError if it is slow."""
        began = time.thread_time()
        with refusing(), contextlib.suppress(ValidationError):
            READERS[name](self, dice)
        assert time.thread_time() - began < SLOW_S, "it took too long"

    def _file(self, name: str, data: bytes) -> Path:
        file = self._folder / name
        file.write_bytes(data)
        return file

    def yaml(self, dice: Random) -> None:
        text = builtin_text(dice.choice(list(builtin_recipes())))
        load_recipe(mangled(dice, text.encode()).decode("utf-8", "surrogateescape"))

    def recipe(self, dice: Random) -> None:
        recipe = parse_recipe(spoiled(dice, dice.choice(self._recipes)))
        make_plan(recipe, self._header)

    def gate(self, dice: Random) -> None:
        with contextlib.suppress(ValueError):  # pydantic expects ValueError from a validator
            parse_gate("size", any_text(dice))

    def json(self, dice: Random) -> None:
        data = as_json(any_value(dice)) if dice.random() < 0.5 else mangled(dice, as_json(self._config))
        for _ in walk("x.json", parse_json("x.json", data)):
            pass

    def config(self, dice: Random) -> None:
        folder = self._folder / "model"
        shutil.copytree(self._model, folder, dirs_exist_ok=True, copy_function=_linked)
        config = self._config | dict.fromkeys(dice.sample(_KEYS, 2), dice.choice((any_value(dice), 1, 2, 3)))
        (folder / "config.json").unlink()
        (folder / "config.json").write_bytes(as_json(config))
        header = inspect_model(FolderFiles(folder))
        header = header.model_copy(update={"model_type": dice.choice(_TYPES)})
        make_plan(parse_recipe(dice.choice(self._recipes + _PLANS)), header)

    def safetensors(self, dice: Random) -> None:
        folder = self._folder / "weights"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_bytes(as_json(self._config))
        (folder / "model.safetensors").write_bytes(mangled(dice, self._weights))
        inspect_model(FolderFiles(folder))

    def rows(self, dice: Random) -> None:
        """A job must be able to read every row of a data set that registration accepts."""
        name = dice.choice(list(_ROWS))
        data = mangled(dice, _ROWS[name])
        if dice.random() < 0.3:
            name, data = f"{name}.gz", gzip.compress(data, mtime=0)
            data = mangled(dice, data) if dice.random() < 0.5 else data
        facts = examine_data(name, [data])
        file = self._file(name, data)
        try:
            rows = read_rows("d", file, model_dir=self._folder)
            assert len(rows) == facts.rows or (".txt" in name and rows)
            for row in rows:
                row.text.encode()
        except NightpressError as error:
            # A job may refuse conversations if the folder has no chat template, and rows with columns that only some metrics read.
            if "has no `text`" in error.message:
                rows_of_columns = read_records("d", file)
                if len(rows_of_columns) != facts.rows:
                    raise AssertionError("a job reads fewer rows than were registered") from error
            elif "template" not in error.message:
                raise AssertionError("a job refuses what was registered") from error

    def parquet(self, dice: Random) -> None:
        data = mangled(dice, self._parquet)
        examine_data("a.parquet", [data])
        read_rows("d", self._file("a.parquet", data))

    def tokenizer(self, dice: Random) -> None:
        small = json.loads(self._tokenizer)
        small["model"]["vocab"] = dict(list(small["model"]["vocab"].items())[:200])
        spoilt = as_json(spoiled(dice, small))
        FastTokenizer(self._file("tokenizer.json", spoilt)).encode("a b", special=True)

    def card(self, dice: Random) -> None:
        text = b"---\nlicense: mit\nbase_model: [a/b]\nlanguage:\n- en\n---\n# A model\n"
        self._file("README.md", mangled(dice, text))
        read_lineage(self._folder)

    def cron(self, dice: Random) -> None:
        parts = [dice.choice((any_text(dice), "*", "0", "1-5", "*/7", "MON", "L", "?", "31")) for _ in range(5)]
        zone = dice.choice((any_text(dice), "Europe/Berlin", "UTC"))
        parse_cron(" ".join(parts), zone, min_interval_s=300, now=_NOW)

    def request(self, dice: Random) -> None:
        model, good = dice.choice(_REQUESTS)
        model.model_validate_json(as_json(spoiled(dice, good)))

    def headers(self, dice: Random) -> None:
        value = any_text(dice).encode("latin-1", "replace").decode("latin-1")
        names = (b"last-event-id", b"range", b"prefer", b"if-range")
        asked = Request({"type": "http", "headers": [(name, value.encode("latin-1")) for name in names]})
        preferred_wait(asked)
        _wanted_range(asked, '"etag"', 100)
        pause_after(1, Answer(503, {"retry-after": value}, b""), dt.datetime.now(dt.UTC))
        verify("whsec_AAAA", {"webhook-id": value, "webhook-timestamp": value, "webhook-signature": value}, b"")
        cursor = partial(_read_cursor, any_text(dice), (jobs.c.created_at, jobs.c.id))
        for reader in (lambda: version_of(value), lambda: resume_point(asked, 0), cursor):
            with refusing():
                reader()

    def addresses(self, dice: Random) -> None:
        text = any_text(dice)
        for reader in (
            lambda: parse_address(dice.choice(("s3://", "hf://", "")) + text, "models", self._settings),
            lambda: check_destinations(
                [dice.choice(("s3://", "hf://", "oci://", "oci://h/{model}:", "")) + text], self._settings, model="m"
            ),
            lambda: check_target(dice.choice(("https://", "http://", "")) + text, (), resolve=lambda *_: ["192.0.2.1"]),
        ):
            with refusing():
                reader()

    def statement(self, dice: Random) -> None:
        signed = sign_statement(self._statement, self._key)
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # not every value can be signed
            signed = sign_statement(spoiled(dice, self._statement), self._key)
        raw = as_json(signed) if dice.random() < 0.5 else mangled(dice, as_json(signed))
        files_of_bundle(raw)
        read_bundle(raw, [self._key.public_key()])


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Suppress a NightpressError that blames the input. Raises AssertionError for one with a status of 500 or more."""
    try:
        yield
    except NightpressError as error:
        if error.kind.status >= 500:
            raise AssertionError(f"it takes the blame: {error}") from error


def _linked(source: str, target: str) -> None:
    if not Path(target).exists():
        Path(target).hardlink_to(source)


_TYPES = ("bert", "distilbert", "albert", "llama", "gpt2", "mixtral", "t5", "vit", "opt", "unknown")
_KEYS = [
    "hidden_size", "dim", "n_embd", "d_model", "intermediate_size", "hidden_dim", "num_hidden_layers", "n_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "n_positions", "num_experts", "num_local_experts",
    "num_experts_per_tok", "layer_types", "rope_scaling", "rope_parameters", "sliding_window", "max_window_layers", "embedding_size",
    "word_embed_proj_dim", "id2label", "num_labels", "label2id", "architectures", "tie_word_embeddings", "image_size", "num_channels",
    "attn_implementation", "_experts_implementation", "custom_pipelines", "transformers_weights",
    "type_vocab_size", "hidden_act", "pad_token_id", "decoder_start_token_id", "problem_type", "nightpress_shapes",
]  # fmt: skip
_PLANS: list[dict[str, Any]] = [
    {"name": "p", "passes": [options], "exports": exports}
    for options, exports in (
        ({"pass": "heads", "sparsity": 0.5}, ["safetensors"]),
        ({"pass": "channels", "sparsity": 0.5}, ["onnx"]),
        ({"pass": "layers", "remove": 1}, ["safetensors"]),
        ({"pass": "distill", "student": {"layers": 1}}, ["safetensors"]),
        ({"pass": "distill", "student": {"config": {"hidden_size": "x", "num_attention_heads": 0}}}, ["safetensors"]),
        ({"pass": "early-exit"}, ["safetensors"]),
        ({"pass": "generation-cache"}, ["safetensors"]),
        ({"pass": "gptq", "bits": 4}, ["compressed-tensors", "gguf"]),
        ({"pass": "profile"}, ["safetensors"]),
        ({"pass": "recover"}, ["onnx", "openvino"]),
    )
]
_SHA = "0" * 64
_REQUESTS: list[tuple[Any, dict[str, Any]]] = [
    (JobCreate, {"model": "m", "recipe": {"name": "x", "passes": []}, "labels": {"a": "b"}, "run_after": "2026-11-24T01:00:00Z"}),
    (ModelCreate, {"name": "m", "files": [{"path": "config.json", "size": 1, "sha256": _SHA, "part_sha256": [_SHA]}]}),
    (DataSetCreate, {"name": "d", "file": {"path": "a.csv", "size": 1, "sha256": _SHA}}),
    (ScheduleCreate, {"name": "n", "cron": "0 2 * * *", "timezone": "UTC", "job": {"model": "m", "recipe": "r"}}),
    (ValidateRequest, {"recipe": {"name": "x"}, "model": "m"}),
]  # fmt: skip

#: name → method of `Readers`
READERS: dict[str, Callable[[Readers, Random], None]] = {
    name: found
    for name, found in vars(Readers).items()
    if callable(found) and not name.startswith("_") and name != "attempt"
}
