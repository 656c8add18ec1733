"""The program that a report shows under "How to use it": loads an artifact, gives it one text, and prints the answer.

It runs as it stands in the folder that holds the artifact's folder. It needs the format's own library, transformers for the tokenizer, and
nothing of Nightpress.
"""

import json
from pathlib import Path

from gguf import GGUFReader

from nightpress.core.compress.data.chat import chat_template
from nightpress.core.compress.data.images import image_shape, normalisation
from nightpress.core.compress.export.pair_programs import pair_program
from nightpress.core.recipes.header import ModelHeader

_TEXT = "The sea was calm, and the ship came home."
_QUESTION = "Which colours does the sea have?"
_NEW_TOKENS = 20

#: task → its name in the pipelines of transformers.js and of model hubs
PIPELINES = {
    "causal-lm": "text-generation",
    "classification": "text-classification",
    "token-classification": "token-classification",
    "masked-lm": "fill-mask",
    "embedding": "feature-extraction",
}

_TRANSFORMERS = """\
import numpy as np
import torch
from transformers import {model_class}, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {model_class}.from_pretrained(folder{own_code}).eval()
"""
#: fp4 weights whose inputs are rounded stay packed, and the first call would unpack them to bfloat16 for every model.
_UNPACK = """\
model.hf_quantizer.compressor.decompress_model(model)
torch.nn.Module.to(model, model.dtype)
"""
_ONNX = """\
import numpy as np
import onnxruntime
from transformers import AutoConfig, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx", providers=["CPUExecutionProvider"])
"""
_OPENVINO = """\
import numpy as np
import openvino
from transformers import AutoConfig, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = openvino.Core().compile_model(f"{{folder}}/openvino_model.xml", "CPU")
"""

_RUN_TRANSFORMERS = """
inputs = tokenizer({text}, return_tensors="pt")
with torch.inference_mode():
    output = model(**inputs).{output}[0].float().numpy()
ids = inputs["input_ids"][0].tolist()
"""
_RUN_ONNX = """
ids = tokenizer({text})["input_ids"]
inputs = {{"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}}
inputs |= {{"token_type_ids": np.zeros((1, len(ids)), np.int64), "position_ids": np.arange(len(ids))[None]}}
names = {{value.name for value in session.get_inputs()}}
output = session.run(None, {{name: inputs[name] for name in names}})[0][0]
"""
_RUN_OPENVINO = """
ids = tokenizer({text})["input_ids"]
inputs = {{"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}}
inputs |= {{"token_type_ids": np.zeros((1, len(ids)), np.int64), "position_ids": np.arange(len(ids))[None]}}
names = {{name for port in model.inputs for name in port.names}} & inputs.keys()
output = model({{name: inputs[name] for name in names}})[0][0]
"""

_ANSWERS = {
    "classes": """
labels = {labels}
chances = np.exp(output - output.max())
chances /= chances.sum()
for at in chances.argsort()[::-1][:3]:
    print(f"{{labels[at]}}: {{chances[at]:.1%}}")
""",
    "labels": """
labels = {labels}
for at, chance in enumerate(1 / (1 + np.exp(-output))):
    print(f"{{labels[at]}}: {{chance:.1%}}")
""",
    "numbers": """
print(*output)
""",
    "token-classification": """
labels = {labels}
for token, scores in zip(tokenizer.convert_ids_to_tokens(ids), output):
    print(token, labels[scores.argmax()])
""",
    "masked-lm": """
scores = output[ids.index(tokenizer.mask_token_id)]
for token in scores.argsort()[::-1][:3]:
    print(tokenizer.decode([token]))
""",
    "embedding": """
{vector}
print(len(vector), "numbers:", vector[:5])
""",
}
#: The vectors of one text without padding, [S, H], pooled by one mode of sentence-transformers.
_POOLED = {
    "mean": "output.mean(axis=0)",
    "cls": "output[0]",
    "lasttoken": "output[-1]",
    "max": "output.max(axis=0)",
    "mean_sqrt_len_tokens": "output.sum(axis=0) / len(output) ** 0.5",
    "weightedmean": "np.average(output, axis=0, weights=np.arange(1, len(output) + 1))",
}

_STATIC = """\
from model2vec import StaticModel

model = StaticModel.from_pretrained("{folder}")
vector = model.encode({text})
print(len(vector), "numbers:", vector[:5])
"""
_PROMPT = """
inputs = tokenizer({text}, return_tensors="{tensors}")
"""
_CHAT = """
messages = [{{"role": "user", "content": {text}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="{tensors}")
"""
_GENERATE = """
with torch.inference_mode():
    tokens = model.generate(**inputs, max_new_tokens={new_tokens})
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
"""
#: Greedy decoding. The graph's keys and values are given back to it, so each step runs the newest token only.
_DECODE_ONNX = """
step, ids = inputs["input_ids"].astype(np.int64), []
shapes = {{value.name: value.shape for value in session.get_inputs()}}
past = {{
    name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items() if name.startswith("past_key_values.")
}}
seen = 0
while len(ids) < {new_tokens}:
    seen += step.shape[1]
    feeds = {{"input_ids": step, "attention_mask": np.ones((1, seen), np.int64), "position_ids": np.arange(seen)[None, -step.shape[1]:]}}
    logits, *present = session.run(None, {{name: value for name, value in feeds.items() if name in shapes}} | past)
    past = dict(zip(past, present))
    ids.append(int(logits[0, -1].argmax()))
    step = np.array([ids[-1:]])
print(tokenizer.decode(ids))
"""
#: The same with OpenVINO, which keeps keys and values in the model's state.
_DECODE_OPENVINO = """
step, ids = inputs["input_ids"].astype(np.int64), []
request, names = model.create_infer_request(), {{name for port in model.inputs for name in port.names}}
seen = 0
while len(ids) < {new_tokens}:
    seen += step.shape[1]
    feeds = {{"input_ids": step, "attention_mask": np.ones((1, seen), np.int64), "position_ids": np.arange(seen)[None, -step.shape[1]:]}}
    feeds["beam_idx"] = np.zeros(1, np.int32)
    logits = request.infer({{name: value for name, value in feeds.items() if name in names}})[0]
    ids.append(int(logits[0, -1].argmax()))
    step = np.array([ids[-1:]])
print(tokenizer.decode(ids))
"""

_GGUF_TEXT = """\
from llama_cpp import Llama

model = Llama("{folder}/model.gguf", n_ctx=512, verbose=False)
"""
_GGUF_PROMPT = """
print(model({text}, max_tokens={new_tokens})["choices"][0]["text"])
"""
_GGUF_CHAT = """
answer = model.create_chat_completion([{{"role": "user", "content": {text}}}], max_tokens={new_tokens})
print(answer["choices"][0]["message"]["content"])
"""
#: Version 0.3.36 of the binding loses its `embedding=True`, so the second call is needed.
_GGUF_EMBEDDING = """\
from llama_cpp import Llama, llama_set_embeddings

model = Llama("{folder}/model.gguf", embedding=True, n_ctx=512, verbose=False)
llama_set_embeddings(model.ctx, True)
vector = model.embed({text}{normalize}){kept}
print(len(vector), "numbers:", vector[:5])
"""

_MLX = """\
from mlx_lm import generate, load

model, tokenizer = load("{folder}")
"""
_MLX_PROMPT = """
print(generate(model, tokenizer, {text}, max_tokens={new_tokens}))
"""
_MLX_CHAT = """
messages = [{{"role": "user", "content": {text}}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
print(generate(model, tokenizer, prompt, max_tokens={new_tokens}))
"""

_IMAGE = """
picture = Image.new("RGB", ({width}, {height}), "seagreen")  # or Image.open("photo.jpg").convert("RGB").resize(({width}, {height}))
pixels = ((np.asarray(picture, np.float32) / 255 - {mean}) / {deviation}).transpose(2, 0, 1)[None].astype(np.float32)
"""
#: Runtime → what loads an image classifier, and what runs it.
_SEES = {
    "transformers": (
        """\
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

folder = "{folder}"
model = AutoModelForImageClassification.from_pretrained(folder).eval()
""",
        """with torch.inference_mode():
    output = model(pixel_values=torch.from_numpy(pixels)).logits[0].numpy()
""",
    ),
    "onnx": (
        """\
import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoConfig

folder = "{folder}"
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx", providers=["CPUExecutionProvider"])
""",
        """output = session.run(None, {{"pixel_values": pixels}})[0][0]
""",
    ),
    "openvino": (
        """\
import numpy as np
import openvino
from PIL import Image
from transformers import AutoConfig

folder = "{folder}"
model = openvino.Core().compile_model(f"{{folder}}/openvino_model.xml", "CPU")
""",
        """output = model({{"pixel_values": pixels}})[0][0]
""",
    ),
}
_JAVASCRIPT = """\
const {{ env, pipeline }} = require("@huggingface/transformers");

env.allowRemoteModels = false;
env.localModelPath = ".";
(async () => {{
  const run = await pipeline("{pipeline}", "{folder}");
  console.log(await run({text}{more}));
}})();
"""


def usage_program(format_: str, artifact: Path, header: ModelHeader) -> str:
    """The program for an artifact's folder, with the source's tokenizer and chat template beside it or, in GGUF, in the file.

    For transformers.js it is a program for Node, else for Python. Empty if no program is known for the format and the task.
    """
    program = _program(format_, artifact, header)
    if "np." not in program:
        program = program.replace("import numpy as np\n", "")
    return program if "AutoConfig." in program else program.replace("AutoConfig, ", "")


def _program(format_: str, artifact: Path, header: ModelHeader) -> str:
    task, folder = header.task, artifact.name
    chat = task == "causal-lm" and _has_chat_template(format_, artifact)
    text = json.dumps(_QUESTION if chat else header.use.text_prompt + _TEXT)
    if format_ == "transformers.js":
        return _javascript(folder, task, header)
    if header.model_type == "model2vec":
        return _STATIC.format(folder=folder, text=text)
    if format_ == "gguf":
        return _gguf(folder, header, text, chat=chat)
    if format_ == "mlx":
        return (_MLX + (_MLX_CHAT if chat else _MLX_PROMPT)).format(folder=folder, text=text, new_tokens=_NEW_TOKENS)
    if header.architecture.endswith("ForImageClassification"):
        mean, deviation = normalisation(artifact)
        _, height, width = image_shape(artifact, header)
        head, run = _SEES.get(format_, _SEES["transformers"])
        read = _IMAGE.format(mean=mean, deviation=deviation, height=height, width=width)
        return head.format(folder=folder) + read + run.format() + _answer("classes", format_, header)
    if task == "other" or header.sees_images:
        return ""
    if task == "seq2seq":
        return pair_program(format_, artifact, header, text, _NEW_TOKENS)
    if task == "masked-lm":
        text = 'f"The sea was {tokenizer.mask_token}."'
    values = {
        "folder": folder,
        "model_class": header.kind.loader,
        "own_code": ", trust_remote_code=True" if (artifact / "custom_generate").is_dir() else "",
        "output": "last_hidden_state" if task == "embedding" else "logits",
        "text": text,
        "new_tokens": _NEW_TOKENS,
        "tensors": "np" if format_ in {"onnx", "openvino"} else "pt",
    }
    torch_head = _TRANSFORMERS + (_UNPACK if rounds_fp4_inputs(artifact) else "")
    head, run, decode = {
        "onnx": (_ONNX, _RUN_ONNX, _DECODE_ONNX),
        "openvino": (_OPENVINO, _RUN_OPENVINO, _DECODE_OPENVINO),
    }.get(format_, (torch_head, _RUN_TRANSFORMERS, _GENERATE))
    if task == "causal-lm":
        return (head + (_CHAT if chat else _PROMPT) + decode).format(**values)
    return (head + run).format(**values) + _answer(header.head if task == "classification" else task, format_, header)


def rounds_fp4_inputs(artifact: Path) -> bool:
    """Whether the folder holds fp4 weights whose inputs are rounded at each call."""
    file = artifact / "config.json"
    stored = (json.loads(file.read_bytes()).get("quantization_config") or {}) if file.is_file() else {}
    return any(
        group.get("input_activations") is not None
        and (group["weights"]["num_bits"], group["weights"]["type"]) == (4, "float")
        for group in (stored.get("config_groups") or {}).values()
    )


def _has_chat_template(format_: str, artifact: Path) -> bool:
    """Whether the artifact has a chat template: a GGUF file among its metadata, all others beside the tokenizer."""
    file = artifact / "model.gguf"
    if format_ == "gguf" and file.is_file():
        return "tokenizer.chat_template" in GGUFReader(file).fields
    return chat_template(artifact) is not None


def _answer(kind: str, format_: str, header: ModelHeader) -> str:
    labels = (
        "AutoConfig.from_pretrained(folder).id2label" if format_ in {"onnx", "openvino"} else "model.config.id2label"
    )
    return _ANSWERS[kind].format(labels=labels, vector=_vector(header))


def _vector(header: ModelHeader) -> str:
    """The lines that make what sentence-transformers returns for one text: pooled, normalized and truncated as the folder says."""
    modes = [_POOLED[mode] for mode in header.pooling.split("+")]
    joined = modes[0] if len(modes) == 1 else f"np.concatenate([{', '.join(modes)}])"
    lines = [f"vector = {joined}"]
    if header.use.normalized:
        lines.append("vector = vector / np.linalg.norm(vector)")
    if header.use.truncate_dim:
        lines.append(f"vector = vector[:{header.use.truncate_dim}]")
    return "\n".join(lines)


def _gguf(folder: str, header: ModelHeader, text: str, *, chat: bool) -> str:
    if header.task == "embedding":
        kept = f"[:{header.use.truncate_dim}]" if header.use.truncate_dim else ""
        normalize = ", normalize=True" if header.use.normalized else ""
        return _GGUF_EMBEDDING.format(folder=folder, text=text, normalize=normalize, kept=kept)
    return (_GGUF_TEXT + (_GGUF_CHAT if chat else _GGUF_PROMPT)).format(
        folder=folder, text=text, new_tokens=_NEW_TOKENS
    )


def _javascript(folder: str, task: str, header: ModelHeader) -> str:
    if task not in PIPELINES:
        return ""
    length = ", normalize: true" if header.use.normalized else ""
    more = {
        "causal-lm": f", {{ max_new_tokens: {_NEW_TOKENS} }}",
        "embedding": f', {{ pooling: "{header.pooling}"{length} }}' if header.pooling in {"mean", "cls"} else "",
    }.get(task, "")
    text = json.dumps("The sea was [MASK]." if task == "masked-lm" else header.use.text_prompt + _TEXT)
    return _JAVASCRIPT.format(pipeline=PIPELINES[task], folder=folder, text=text, more=more)
