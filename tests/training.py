"""Shared by the tests of the training passes: a small classifier, language model and embedder, and rows to train on."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.passes import MODEL_PASSES
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan

_WORDS = ("lamp", "river", "stone", "window", "garden", "letter", "horse", "winter", "road", "bread")


def classifier(bert_tiny: Path, folder: Path, *, blocks: int = 4, seed: int = 0, outputs: int = 2) -> Path:
    """A BERT with random weights and BERT-tiny's tokenizer: `blocks` × 32, two classes; with one output, a reranker."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=outputs,
        initializer_range=0.2,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return _with_tokenizer(bert_tiny, folder)


def language_model(bert_tiny: Path, folder: Path, *, blocks: int = 4) -> Path:
    """A Llama with random weights and BERT-tiny's tokenizer: `blocks` × 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return _with_tokenizer(bert_tiny, folder)


def masked_model(bert_tiny: Path, folder: Path) -> Path:
    """A BERT with random weights and BERT-tiny's tokenizer that fills in masked words: 4 blocks × 32."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, initializer_range=0.2
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return _with_tokenizer(bert_tiny, folder)


def embedder(bert_tiny: Path, folder: Path, *, blocks: int = 4) -> Path:
    """A BERT with random weights and BERT-tiny's tokenizer, without a head: `blocks` × 32."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=blocks, num_attention_heads=4, intermediate_size=64, initializer_range=0.2
    )
    BertModel(config).save_pretrained(folder)
    return _with_tokenizer(bert_tiny, folder)


def _with_tokenizer(bert_tiny: Path, folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert_tiny / name, folder / name)
    return folder


def rows(file: Path, count: int = 120) -> Path:
    """Write sentences that contain "good" or "bad", with the matching label."""
    lines = []
    for at in range(count):
        words = " ".join(_WORDS[(at * 7 + place * 3) % len(_WORDS)] for place in range(1 + at % 9))
        lines.append(json.dumps({"text": f"a {'good' if at % 2 else 'bad'} {words}", "label": at % 2}))
    file.write_text("\n".join(lines) + "\n")
    return file


def run_pass(
    source: Path, work: Path, options: dict[str, Any], *, export: str = "safetensors", **context: Any
) -> tuple[Path, PassRecord]:
    """Plan and run one pass, as a job would."""
    recipe = parse_recipe({"name": "test", "passes": [options], "exports": [export]})
    header = inspect_model(FolderFiles(source))
    make_plan(recipe, header)
    (work / "work").mkdir(parents=True, exist_ok=True)
    given = PassContext(header=header, work_dir=work / "work", **context)
    return work / "out", MODEL_PASSES[options["pass"]](source, work / "out", recipe.passes[0], given)
