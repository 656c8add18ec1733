"""A manifest lists the files that a child made. Reading it returns what was written, and it names no path outside its folder."""

import hashlib
import tempfile
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from nightpress.core.handoff.manifest import ArtifactEntry, FileEntry, Manifest, describe_folder, digest_of

NAMES = st.from_regex(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,20}", fullmatch=True).filter(lambda name: name != "..")
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
ENTRIES = st.builds(
    FileEntry,
    path=PATHS,
    size=st.integers(0, 2**60),
    sha256=st.binary(max_size=8).map(lambda data: hashlib.sha256(data).hexdigest()),
)
MANIFESTS = st.builds(
    Manifest,
    job_id=st.text(max_size=40),
    attempt=st.integers(1, 10**6),
    verdict=st.sampled_from(["accepted", "rejected"]),
    artifacts=st.lists(
        st.builds(
            ArtifactEntry,
            format=st.text(max_size=20),
            path=PATHS,
            files=st.lists(ENTRIES, max_size=4).map(tuple),
            consumer=st.text(max_size=20),
        ),
        max_size=3,
    ).map(tuple),
    report=st.lists(ENTRIES, max_size=3).map(tuple),
)


@given(MANIFESTS)
@pytest.mark.slow
def test_a_manifest_comes_back_as_it_was_written(manifest: Manifest):
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


@given(
    st.lists(st.sampled_from(["..", ".", "", "a", "b.bin", "\\", "\n", "\x00"]), min_size=1, max_size=5).map("/".join)
)
def test_no_path_leads_out_of_the_folder(path: str):
    """True of an artifact's path and of a file's: both decide what the supervisor reads, and under which key it stores it."""
    made = []
    for take in (
        lambda: FileEntry(path=path, size=0, sha256="0" * 64),
        lambda: ArtifactEntry(format="onnx", path=path, files=(), consumer=""),
    ):
        try:
            made.append(take().path)
        except ValidationError:
            continue
    assert len(made) in {0, 2}
    if made:
        assert ".." not in PurePosixPath(path).parts
        assert (Path("/out") / path).as_posix() == f"/out/{path}"


@given(st.dictionaries(PATHS, st.binary(max_size=50), max_size=5))
@pytest.mark.slow
def test_a_folders_digest_is_of_what_is_in_it(contents: dict[str, bytes]):
    with tempfile.TemporaryDirectory() as folder:
        for path, data in contents.items():
            target = Path(folder, path)
            assume(not target.is_dir() and not any(above.is_file() for above in target.parents))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        files = describe_folder(Path(folder))
    assert {file.path: file.size for file in files} == {path: len(data) for path, data in contents.items()}
    assert digest_of(files) == digest_of(files[::-1])
