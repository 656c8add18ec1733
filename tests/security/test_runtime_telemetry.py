"""ONNX Runtime's telemetry stays off: no identifier is written to disk, in this process or in a consumer's."""

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from nightpress.core.compress.export.consumer_environment import consumer_environment
from nightpress.worker.sandbox import child_environment
from tests.service import ROOT

_OURS = "import sys; from pathlib import Path; from nightpress.core.compress.graph.samples import session; session(Path(sys.argv[1]), 1)"
_CONSUMERS = "import sys, onnxruntime; onnxruntime.InferenceSession(sys.argv[1])"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    made = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", ends[:1], ends[1:])
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    onnx.save(helper.make_model(made, ir_version=9, opset_imports=[helper.make_opsetid("", 17)]), str(path))
    return path


@pytest.mark.parametrize("where", ["the press's process", "a consumer", "a worker's child"])
@pytest.mark.slow
def test_a_session_leaves_nothing_outside_its_folder(
    graph: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")  # tests/conftest.py sets it
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    for folder in (home, scratch, scratch / "tmp"):
        folder.mkdir()
    own = {"HOME": str(home), "TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
    environment, program = {
        "the press's process": ({"PYTHONPATH": str(ROOT)}, _OURS),
        "a consumer": (consumer_environment(1, scratch), _CONSUMERS),
        "a worker's child": (child_environment(tmp_path, 1), _CONSUMERS),
    }[where]
    subprocess.run([sys.executable, "-c", program, str(graph)], check=True, env=environment | own, cwd=tmp_path)
    assert [path for path in (*home.rglob("*"), *scratch.rglob("*")) if path.is_file()] == []
