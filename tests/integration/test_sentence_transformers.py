"""An embedder of sentence-transformers keeps its pooling, prompts, normalization and similarity in every artifact, and is measured by them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nightpress.core.compress.export.program import usage_program
from nightpress.core.compress.export.sentence import complete_layout
from nightpress.core.errors import NightpressError
from nightpress.core.handoff.report import Report
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.sentence import EmbedderUse, read_use
from tests.press import lay_out, press
from tests.training import embedder
from tests.usage import run_here

ROWS = [
    {"query": "a cat sat", "positive": "the mat had a cat on it", "negative": "stocks fell in London"},
    {"query": "it is raining", "positive": "rain falls on the garden", "negative": "he plays chess by the window"},
    {"query": "bread", "positive": "she bakes bread every winter", "negative": "the horse stood on the road"},
    {"query": "a letter", "positive": "he wrote a letter by the lamp", "negative": "a stone lay in the river"},
]
PROMPTS = {"query": "find the text: ", "document": "a text: ", "any": "words: "}
_TEXT = "The sea was calm, and the ship came home."  #: of the programs


@pytest.fixture(scope="module")
def source(bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedder as sentence-transformers saves it: pooled by the maximum, normalized, with prompts, compared by the distance."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    tmp = tmp_path_factory.mktemp("embedder")
    transformer = Transformer(str(embedder(bert_tiny, tmp / "bare", blocks=1)))
    modules = [transformer, Pooling(32, pooling_mode="max"), Normalize()]
    model = SentenceTransformer(
        modules=modules, prompts=PROMPTS, default_prompt_name="any", similarity_fn_name="euclidean"
    )
    model.save_pretrained(str(tmp / "model"), create_model_card=False)
    return tmp / "model"


@pytest.fixture(scope="module")
def pressed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    recipe = {
        "passes": [],
        "exports": ["safetensors", "onnx", "openvino"],
        "evaluate": [{"metric": "retrieval", "data": "pairs"}],
    }
    data = {"pairs": "".join(json.dumps(row) + "\n" for row in ROWS)}
    job = lay_out(tmp_path_factory.mktemp("press") / "job", source, recipe, data)
    _, report, _ = press(job)
    return job / "out", report


def _texts() -> tuple[list[str], list[str]]:
    return [row["query"] for row in ROWS], [text for row in ROWS for text in (row["positive"], row["negative"])]


@pytest.mark.slow
def test_retrieval_is_measured_as_the_library_itself_retrieves(source: Path, pressed: tuple[Path, Report]) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(source), device="cpu")
    queries, documents = _texts()
    near = model.similarity(model.encode_query(queries), model.encode_document(documents)).numpy()
    ranks = [int((row > row[2 * at]).sum()) for at, row in enumerate(near)]
    expected = np.mean([1 / np.log2(2 + rank) for rank in ranks])
    found = next(figure for figure in pressed[1].source.measurements if figure.name == "ndcg")
    assert found.value == pytest.approx(expected, abs=1e-6)
    assert sum(ranks) > 0, "every query finds its document first: prompts and similarity would not be seen"


@pytest.mark.slow
def test_the_library_loads_the_weights_and_keeps_everything(source: Path, pressed: tuple[Path, Report]) -> None:
    from sentence_transformers import SentenceTransformer

    ours, theirs = (SentenceTransformer(str(folder), device="cpu") for folder in (pressed[0] / "safetensors", source))
    assert ours.prompts == theirs.prompts == PROMPTS
    assert ours.similarity_fn_name == "euclidean"
    assert [type(module).__name__ for module in ours] == ["Transformer", "Pooling", "Normalize"]
    assert ours[1].pooling_mode == "max"
    np.testing.assert_allclose(ours.encode_query(_texts()[0]), theirs.encode_query(_texts()[0]), atol=1e-6)


@pytest.mark.parametrize(
    ("format_", "backend", "name", "glob"),
    [("onnx", "ONNX", "model.onnx", "*.onnx"), ("openvino", "OpenVINO", "openvino_model.xml", "openvino*.xml")],
)
@pytest.mark.slow
def test_the_librarys_backends_find_the_graph_and_its_modules_make_the_same_vectors(
    format_: str, backend: str, name: str, glob: str, source: Path, pressed: tuple[Path, Report]
) -> None:
    """The library's own rule finds the file. Its loader, optimum, does not install beside this transformers: the graph is run as it would."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.backend.utils import backend_should_export
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from transformers import AutoTokenizer

    folder = pressed[0] / format_
    assert backend_should_export(folder, True, {}, name, glob, backend)[0] is False
    texts = [PROMPTS["document"] + text for text in _texts()[1]]
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="np")
    features = {
        "token_embeddings": torch.from_numpy(_run(folder / name, dict(inputs))),
        "attention_mask": torch.from_numpy(inputs["attention_mask"]),
    }
    for module in (Pooling.load(str(folder), subfolder="1_Pooling"), Normalize.load(str(folder))):
        features = module(features)
    expected = SentenceTransformer(str(source), device="cpu").encode_document(_texts()[1])
    np.testing.assert_allclose(features["sentence_embedding"].numpy(), expected, atol=2e-3)


def _run(file: Path, inputs: dict[str, Any]) -> np.ndarray:
    """The output that optimum takes, by its name, from the inputs that the graph names."""
    if file.suffix == ".xml":
        import openvino

        model = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        names = {name for port in model.inputs for name in port.names}
        return np.array(model({key: inputs[key] for key in names})["last_hidden_state"])
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = {port.name for port in session.get_inputs()}
    assert names <= inputs.keys()
    return np.asarray(session.run(["last_hidden_state"], {key: inputs[key] for key in names})[0])


@pytest.mark.slow
def test_the_programs_of_the_report_embed_as_the_library_does(source: Path, pressed: tuple[Path, Report]) -> None:
    """Each is run as it stands. The folder's default prompt is put before the text, and the vector is normalized."""
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(source), device="cpu").encode(_TEXT)
    for artifact in pressed[1].artifacts:
        printed, variables = run_here(artifact.usage, pressed[0])
        assert printed.startswith("32 numbers:")
        np.testing.assert_allclose(variables["vector"], expected, atol=2e-3, err_msg=artifact.name)


@pytest.mark.parametrize(
    "pooling", ["mean", "cls", "lasttoken", "mean_sqrt_len_tokens", "weightedmean", "mean+cls", "max"]
)
@pytest.mark.slow
def test_the_programs_pool_and_truncate_as_the_library_does(
    pooling: str, source: Path, pressed: tuple[Path, Report]
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    transformer = SentenceTransformer(str(source), device="cpu")[0]
    modules = [transformer, Pooling(32, pooling_mode=tuple(pooling.split("+")))]
    expected = SentenceTransformer(modules=modules, device="cpu", truncate_dim=24).encode(_TEXT)
    use = EmbedderUse(truncate_dim=24)
    header = inspect_model(FolderFiles(source)).model_copy(update={"pooling": pooling, "use": use})
    for format_ in ("safetensors", "onnx", "openvino"):
        _, variables = run_here(usage_program(format_, pressed[0] / format_, header), pressed[0])
        np.testing.assert_allclose(variables["vector"], expected, atol=2e-3, err_msg=format_)


@pytest.mark.parametrize("format_", ["safetensors", "onnx", "openvino"])
@pytest.mark.slow
def test_text_embeddings_inference_and_fastembed_find_what_they_read(
    format_: str, pressed: tuple[Path, Report]
) -> None:
    """Their own rules: the first reads a key for each pooling mode and the longest text, the second the tokenizer's and a padding token."""
    folder = pressed[0] / format_
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_bytes())
    assert pooling["pooling_mode_max_tokens"] is True
    assert pooling["pooling_mode_cls_token"] is pooling["pooling_mode_mean_tokens"] is False
    assert json.loads((folder / "sentence_bert_config.json").read_bytes())["max_seq_length"] == 512
    assert (folder / "tokenizer.json").is_file()
    tokenizer = json.loads((folder / "tokenizer_config.json").read_bytes())
    assert tokenizer["model_max_length"] == 512
    assert tokenizer["pad_token"] == "[PAD]"
    assert json.loads((folder / "config.json").read_bytes())["pad_token_id"] == 0


@pytest.mark.slow
def test_a_layout_that_is_complete_is_left_alone(pressed: tuple[Path, Report]) -> None:
    folder = pressed[0] / "safetensors"
    file = folder / "1_Pooling" / "config.json"
    before = file.stat().st_mtime_ns
    complete_layout(folder, inspect_model(FolderFiles(folder)))
    assert file.stat().st_mtime_ns == before


def _read(files: dict[str, Any]) -> EmbedderUse:
    return read_use(partial(dict.get, files))


def test_what_the_folder_says_is_read() -> None:
    config = {
        "prompts": {"passage": "p: ", "any": "a: "},
        "default_prompt_name": "any",
        "similarity_fn_name": "dot",
        "truncate_dim": 64,
    }
    use = _read({"config_sentence_transformers.json": config})
    assert (use.similarity, use.truncate_dim, use.normalized) == ("dot", 64, False)
    assert (use.query_prompt, use.document_prompt, use.text_prompt) == ("a: ", "p: ", "a: ")
    assert _read({}) == EmbedderUse()


@pytest.mark.parametrize(
    "config",
    [
        [],
        {"prompts": ["query"]},
        {"prompts": {"query": 1}},
        {"default_prompt_name": "none"},
        {"similarity_fn_name": "nearness"},
        {"truncate_dim": 0},
        {"truncate_dim": True},
    ],
)
def test_what_the_library_would_not_understand_is_refused(config: Any) -> None:
    with pytest.raises(NightpressError, match=r"config_sentence_transformers\.json"):
        _read({"config_sentence_transformers.json": config})
