"""The programs for an encoder-decoder's artifact: each reads one text or sound, and writes on greedily. See program.py."""

from pathlib import Path

from nightpress.core.compress.data.decoder_text import first_tokens
from nightpress.core.recipes.header import ModelHeader

_HEADS = {
    "onnx": """\
import numpy as np
import onnxruntime
from transformers import AutoTokenizer{more}

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
encoder, decoder = (
    onnxruntime.InferenceSession(f"{{folder}}/{{name}}.onnx", providers=["CPUExecutionProvider"])
    for name in ("encoder_model", "decoder_model_merged")
)
""",
    "openvino": """\
import numpy as np
import openvino
from transformers import AutoTokenizer{more}

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
encoder, decoder = (
    openvino.Core().compile_model(f"{{folder}}/{{name}}.xml", "CPU")
    for name in ("openvino_encoder_model", "openvino_decoder_model")
)
""",
    "transformers": """\
import numpy as np
import torch
from transformers import {model_class}, AutoTokenizer{more}

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {model_class}.from_pretrained(folder).eval()
""",
}
_TEXT = """
given = {{key: value for key, value in tokenizer({text}, return_tensors="np").items() if key in ("input_ids", "attention_mask")}}
"""
_SOUND = """
sound = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)  # or one second of your own, from -1 to 1, at 16 kHz
extractor = {extractor}
given = {{"input_features": extractor(sound, sampling_rate=16000, return_tensors="np", padding="max_length", max_length={length})["input_features"]}}
"""
#: Greedy decoding. The caches are given back to the decoder, so each step runs the newest token only.
_RUNS = {
    "onnx": """
hidden = encoder.run(None, given)[0]
shapes = {{value.name: value.shape for value in decoder.get_inputs()}}
past = {{
    name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items() if name.startswith("past_key_values.")
}}
step, ids = np.array([{prefix}]), []
while len(ids) < {new_tokens} and tokenizer.eos_token_id not in ids:
    feeds = {{"input_ids": step, "encoder_hidden_states": hidden, "encoder_attention_mask": given.get("attention_mask")}}
    logits, *present = decoder.run(None, {{name: value for name, value in feeds.items() if name in shapes}} | past)
    past = dict(zip(past, present))
    ids.append(int(logits[0, -1].argmax()))
    step = np.array([ids[-1:]])
print(tokenizer.decode(ids, skip_special_tokens=True))
""",
    "openvino": """
hidden = encoder(given)[0]
request, names = decoder.create_infer_request(), {{name for port in decoder.inputs for name in port.names}}
step, ids = np.array([{prefix}]), []
while len(ids) < {new_tokens} and tokenizer.eos_token_id not in ids:
    feeds = {{"input_ids": step, "encoder_hidden_states": hidden, "encoder_attention_mask": given.get("attention_mask")}}
    feeds["beam_idx"] = np.zeros(1, np.int32)
    logits = request.infer({{name: value for name, value in feeds.items() if name in names}})[0]
    ids.append(int(logits[0, -1].argmax()))
    step = np.array([ids[-1:]])
print(tokenizer.decode(ids, skip_special_tokens=True))
""",
    "transformers": """
given = {{name: torch.from_numpy(value) for name, value in given.items()}}
start = torch.tensor([{prefix}])
with torch.inference_mode():
    tokens = model.generate(**given, decoder_input_ids=start, max_new_tokens={new_tokens}, do_sample=False, num_beams=1)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
""",
}


def pair_program(format_: str, artifact: Path, header: ModelHeader, text: str, new_tokens: int) -> str:
    """The program for an artifact's folder. text: as it stands in the program, with its quotes."""
    runtime = format_ if format_ in _RUNS else "transformers"
    values = {
        "folder": artifact.name,
        "model_class": header.kind.loader,
        "more": ", WhisperFeatureExtractor" if header.hears else "",
        "text": text,
        "extractor": "WhisperFeatureExtractor.from_pretrained(folder)"
        if (artifact / "preprocessor_config.json").is_file()
        else f"WhisperFeatureExtractor(feature_size={header.features[0]})",
        "length": 160 * header.features[1],
        "prefix": list(first_tokens(artifact, header)),
        "new_tokens": new_tokens,
    }
    return (_HEADS[runtime] + (_SOUND if header.hears else _TEXT) + _RUNS[runtime]).format(**values)
