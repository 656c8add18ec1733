"""Validates an untrusted model and reads its header, without torch.

Only file names on an allow-list are accepted. Weights are safetensors, and their header is read strictly. Nothing is unpickled, and no
template is rendered.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.adapters import Adapter, AdapterHeader, adapter_files, read_adapter
from nightpress.core.recipes.bounds import kind_flaw, size_flaw
from nightpress.core.recipes.filenames import ADAPTER_FILE, ADAPTER_WEIGHTS, INDEX_FILE, WEIGHTS_FILE, raise_all
from nightpress.core.recipes.header import ModelHeader, TensorInfo, class_of
from nightpress.core.recipes.jsonfile import JsonBudget, malformed, parse_json, walk
from nightpress.core.recipes.model_files import ModelFiles
from nightpress.core.recipes.other_kinds import is_adapter
from nightpress.core.recipes.pooling import read_pooling
from nightpress.core.recipes.remote_code import code_flaw
from nightpress.core.recipes.safetensors import MAX_TENSORS, read_safetensors_header
from nightpress.core.recipes.selection import Selection, select_adapter, select_files
from nightpress.core.recipes.sentence import read_use
from nightpress.core.recipes.stored_forms import float_view

MAX_FILES = 2000
_MAX_LISTED = 50_000  #: number of names in a folder, whatever they are
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer.model",
        "vocab.txt",
        "vocab.json",
        "spiece.model",
        "sentencepiece.bpe.model",
        "spm.model",
    }
)

_CONFIG_BYTES = 1024**2
_JSON_BYTES = 16 * 1024**2
_NOT_PARSED = frozenset(
    {"tokenizer.json", "vocab.json", "added_tokens.json", "unigram.json", INDEX_FILE}
)  #: large files that every reader treats as data; the index is parsed where the tensors are read

_MOST_ERRORS = 100  #: number of errors in a model's JSON after which the search ends
_DUNDER = re.compile(r"__\w+__")


class FolderFiles:
    """The model in a local folder as it lies: `select_files` says which files belong to it, and no others are opened.

    A link to a file is followed if its target is in the folder. The Hub's cache keeps a repository's files in `blobs`, and each
    `snapshots/<revision>` holds links to them: links of such a folder may also lead to `blobs`. Other links are refused if the model needs
    them, and left out otherwise. Links to folders are never followed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._within = [self.root]
        if self.root.parent.name == "snapshots":
            self._within.append(self.root.parents[1] / "blobs")

    def names(self) -> Mapping[str, int]:
        return {name: self.path(name).stat().st_size for name in self.selection().files}

    def selection(self) -> Selection:
        """The files of the model, or of the adapter, and what is left out.

        Raises what `select_files` and `select_adapter` raise, and path_not_allowed for a needed link that leads out.
        """
        listing = self.listing()
        found = select_adapter(listing) if is_adapter(listing) else select_files(listing, self._read_small)
        if len(found.files) > MAX_FILES:
            raise malformed(found.files[-1], f"its folder has more than {MAX_FILES} files; one model is one folder")
        return found

    def path(self, name: str) -> Path:
        """Return the file's resolved path. Resolved at every call, because a link can change between calls.

        Raises NightpressError: path_not_allowed for a target outside the folder or one that is no plain file, not_found for a missing file.
        """
        base, inside = self._checked(name)
        return base / inside

    def _checked(self, name: str) -> tuple[Path, Path]:
        """As `_place`, for a plain file that is there; raises what `path` raises."""
        base, inside = self._place(name)
        real = base / inside
        if real.is_dir():
            raise _not_a_file(name, "is a link to a folder")
        if not real.exists():
            raise NightpressError(
                ErrorCode.NOT_FOUND,
                f"{name} is not there, or is a link to nothing.",
                hint="Put the file back, or fetch the model again and register it anew.",
                file=name,
            )
        if not real.is_file():
            raise _not_a_file(name, "is no plain file")
        return base, inside

    def open(self, name: str) -> BufferedReader:
        """Open a file for reading. A link that is exchanged between the check and the opening is not followed: no step follows links."""
        base, inside = self._checked(name)  # its errors are clearer than those of the system
        handle = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for part in inside.parts[:-1]:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle)
                os.close(handle)
                handle = below
            file = os.open(inside.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=handle)
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENOTDIR, errno.ENXIO}:
                raise _not_a_file(name, "was exchanged while it was opened") from error
            raise
        finally:
            os.close(handle)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise _not_a_file(name, "is no plain file")
        return os.fdopen(file, "rb")

    def read(self, path: str, offset: int, size: int) -> bytes:
        with self.open(path) as source:
            source.seek(offset)
            return source.read(size)

    def _place(self, name: str) -> tuple[Path, Path]:
        """The allowed folder that holds the file, without links, and the file's path below it."""
        try:
            real = (self.root / name).resolve()
        except (RuntimeError, OSError):  # a link to itself
            raise _not_a_file(name, "is a link that leads to itself") from None
        for folder in self._within:
            if real != folder and real.is_relative_to(folder):
                return folder, real.relative_to(folder)
        raise _not_a_file(name, "leads out of its folder")

    def listing(self) -> list[str]:
        """The names of all files at the top and one folder below it. Deeper folders, links to folders and hidden folders end with `/`."""
        found: list[str] = []
        for entry in _entries(self.root):
            below = entry.is_dir(follow_symlinks=False)
            if not below or entry.name.startswith("."):
                found.append(entry.name + "/" * _is_folder(entry))
            else:
                found += (f"{entry.name}/{file.name}" + "/" * _is_folder(file) for file in _entries(Path(entry.path)))
            if len(found) > _MAX_LISTED:
                raise malformed(entry.name, f"its folder has more than {_MAX_LISTED} files; one model is one folder")
        return found

    def _read_small(self, name: str) -> bytes:
        size = self.path(name).stat().st_size
        if size > _JSON_BYTES:
            raise malformed(name, f"it has {size} bytes; at most {_JSON_BYTES} are read")
        return self.read(name, 0, size)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(islice(entries, _MAX_LISTED + 1), key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _not_a_file(name: str, why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.PATH_NOT_ALLOWED,
        f"{name} {why}.",
        hint="Copy the folder with its links resolved, e.g. with `cp -rL`, and take what is no plain file out of it.",
        file=name,
    )


def inspect_model(files: ModelFiles) -> ModelHeader:
    """Validate a model and return its header.

    Raises NightpressError: unsupported_format for files that are no safetensors model, malformed_model for damaged or inconsistent files,
    unsupported_architecture if config.json names no `model_type`. Each error names the file.
    """
    every = files.names()
    chosen = select_files(every, lambda path: _read_small(files, path, every[path]))
    sizes = {path: every[path] for path in chosen.files}
    budget = JsonBudget()
    config = _read_config(files, sizes, budget)
    raise_all(islice(_code_in(files, sizes, budget), _MOST_ERRORS))
    tensors, offsets = _read_tensors(files, sizes, budget)
    view = float_view(config, tensors, lambda name: files.read(*offsets[name]))
    if view is not None:
        tensors = list(view.tensors)
    architectures = config.get("architectures") or [""]
    header = ModelHeader(
        model_type=config["model_type"],
        architecture=class_of(architectures[0], config["model_type"], tensors),
        config={key: value for key, value in config.items() if key != "quantization_config"},
        tensors=tuple(tensors),
        has_tokenizer=not TOKENIZER_FILES.isdisjoint(sizes),
        brought=None if view is None else view.brought,
    )
    if header.task != "embedding" or header.sees_images:
        return header

    def read(path: str) -> Any:
        return _read_json(files, path, sizes[path], _CONFIG_BYTES, budget) if path in sizes else None

    return header.model_copy(update={"pooling": read_pooling(read), "use": read_use(read)})


def check_adapter(files: FolderFiles, base: ModelHeader) -> Adapter:
    """Validate an adapter's folder and match it with its base. Raises NightpressError as `read_adapter`, and for damaged files."""
    adapter_files(files.listing())  # its errors say what is missing
    found = inspect_adapter(files)
    return read_adapter(found.config, found.tensors, base.tensors)


def inspect_adapter(files: ModelFiles) -> AdapterHeader:
    """Validate an adapter's files and return its header. Raises NightpressError(unsupported_format, malformed_model)."""
    budget = JsonBudget()
    every = files.names()
    sizes = {name: every[name] for name in select_adapter(every).files}
    config = _read_json(files, ADAPTER_FILE, sizes[ADAPTER_FILE], _CONFIG_BYTES, budget)
    if not isinstance(config, dict):
        raise malformed(ADAPTER_FILE, "it is not a JSON object")
    jsons = {name: size for name, size in sizes.items() if not name.endswith(".safetensors")}
    raise_all(islice(_code_in(files, jsons, budget), _MOST_ERRORS))
    tensors = read_safetensors_header(files, ADAPTER_WEIGHTS, sizes[ADAPTER_WEIGHTS])
    return AdapterHeader(config, tuple(tensors))


def _read_config(files: ModelFiles, sizes: Mapping[str, int], budget: JsonBudget) -> dict[str, Any]:
    if "config.json" not in sizes:
        raise NightpressError(
            ErrorCode.MALFORMED_MODEL,
            "The model has no config.json at the top of its folder.",
            hint="Bring the whole folder that `save_pretrained` wrote.",
            file="config.json",
        )
    config = _read_json(files, "config.json", sizes["config.json"], _CONFIG_BYTES, budget)
    if not isinstance(config, dict):
        raise malformed("config.json", "it is not a JSON object")
    for key, value in walk("config.json", config):
        _check_value(key, value)
    for key, value in config.items():
        if (flaw := size_flaw(key, value, at_the_top=True)) is not None:
            raise malformed("config.json", flaw)
    architectures = config.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list)
        and all(isinstance(architecture, str) and architecture.isidentifier() for architecture in architectures)
    ):
        raise malformed("config.json", "`architectures` is not a list of class names")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", model_type):
        raise NightpressError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            "config.json names no `model_type`, so nobody knows how to build the model.",
            hint="Save the model with a current transformers, which writes it.",
            file="config.json",
        )
    return config


def _check_value(key: str, value: Any) -> None:
    if isinstance(value, dict):
        for inner, content in value.items():
            if (flaw := kind_flaw(inner, content)) is not None:
                raise malformed("config.json", flaw)
    if (flaw := size_flaw(key, value)) is not None:
        raise malformed("config.json", flaw)
    if key == "_name_or_path" and isinstance(value, str) and ".." in re.split(r"[/\\]", value):
        raise malformed("config.json", "`_name_or_path` climbs out of a folder")


def _code_in(files: ModelFiles, sizes: Mapping[str, int], budget: JsonBudget) -> Iterator[NightpressError]:
    """Yield an error for each field that names code to run.

    Raises NightpressError(malformed_model) for JSON that does not parse, and for a chat template that uses Python's internals.
    """
    for path, size in sizes.items():
        pure = PurePosixPath(path)
        if pure.suffix == ".jinja":
            if size > _CONFIG_BYTES:
                raise malformed(path, f"it has {size} bytes; a template has at most {_CONFIG_BYTES}")
            _check_template(path, files.read(path, 0, size).decode(errors="replace"))
        if pure.suffix != ".json" or path in _NOT_PARSED:
            continue
        for key, value in walk(path, _read_json(files, path, size, _JSON_BYTES, budget)):
            if (flaw := code_flaw(key, value)) is not None:
                yield NightpressError(
                    ErrorCode.UNSUPPORTED_FORMAT,
                    f"{path} {flaw}, which never happens here.",
                    hint=f"Take `{key[:60]}` out of the file if the model works without it. A model that needs code of its own "
                    "can be pressed once transformers has its architecture built in.",
                    file=path,
                )
            if key in {"chat_template", "template"} and isinstance(value, str):
                _check_template(path, value)


def _check_template(path: str, template: str) -> None:
    if found := _DUNDER.search(template):
        raise malformed(path, f"its chat template uses {found[0][:40]}, which only an attack does")


def _read_small(files: ModelFiles, path: str, size: int) -> bytes:
    if size > _JSON_BYTES:
        raise malformed(path, f"it has {size} bytes; at most {_JSON_BYTES} are read")
    return files.read(path, 0, size)


def _read_json(files: ModelFiles, path: str, size: int, limit: int, budget: JsonBudget) -> Any:
    if size > limit:
        raise malformed(path, f"it has {size} bytes; at most {limit} are read")
    data = files.read(path, 0, size)
    budget.take(path, data)
    return parse_json(path, data)


#: tensor → its file, offset in it, and size in bytes
Places = dict[str, tuple[str, int, int]]


def _read_tensors(files: ModelFiles, sizes: Mapping[str, int], budget: JsonBudget) -> tuple[list[TensorInfo], Places]:
    weights = [path for path in sizes if path.endswith(".safetensors")]
    if not weights:
        raise NightpressError(
            ErrorCode.UNSUPPORTED_FORMAT,
            "The model has no safetensors weights.",
            hint=f"Bring {WEIGHTS_FILE}, or its shards with {INDEX_FILE}.",
        )
    if INDEX_FILE in sizes:
        weight_map = _read_index(files, sizes, budget)
    elif WEIGHTS_FILE in sizes:
        weight_map = None
    else:
        raise malformed(weights[0], f"there is neither {WEIGHTS_FILE} nor {INDEX_FILE} to say which tensors lie where")
    used = {WEIGHTS_FILE} if weight_map is None else set(weight_map.values())
    tensors: list[TensorInfo] = []
    places: Places = {}
    for path in sorted(used):
        found = read_safetensors_header(files, path, sizes[path])
        offset = sizes[path] - sum(tensor.size for tensor in found)
        for tensor in found:
            places[tensor.name] = (path, offset, tensor.size)
            offset += tensor.size
            if weight_map is not None and weight_map.pop(tensor.name, None) != path:
                raise malformed(path, f"{INDEX_FILE} does not place the tensor {tensor.name[:200]} here, and only here")
            tensors.append(tensor)
        if len(tensors) > MAX_TENSORS:
            raise malformed(path, f"the model has more than {MAX_TENSORS} tensors")
    if weight_map:
        raise malformed(INDEX_FILE, f"it names the tensor {next(iter(weight_map))[:200]}, which no shard has")
    return tensors, places


def _read_index(files: ModelFiles, sizes: Mapping[str, int], budget: JsonBudget) -> dict[str, str]:
    index = _read_json(files, INDEX_FILE, sizes[INDEX_FILE], _JSON_BYTES, budget)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise malformed(INDEX_FILE, "it has no `weight_map` from tensors to files")
    return weight_map
