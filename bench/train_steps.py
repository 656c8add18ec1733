"""Training steps per second: our loop beside a plain loop."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import torch

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.passes import MODEL_PASSES
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe

TRAIN = {"data": "train", "length": 96, "batch": 32, "learning_rate": 1e-4, "validation": 0.05}


def read_lines(file: Path) -> list[str]:
    return gzip.decompress(file.read_bytes()).decode().splitlines()


def compare_steps(model: Path, rows: Path, device: str, scratch: Path) -> dict[str, float]:
    """Run our loop and a plain loop in turns, on the same work: half of the blocks, batches of 32 rows, loss on logits and labels.

    Returns the steps per second of each.
    """
    steps = 200 if device == "cuda" else 6
    options = {
        "pass": "distill",
        "student": {"layers": [0, 2, 4]},
        "logits": {"alpha": 0.5},
        "train": {**TRAIN, "steps": steps, "validation": 0},
    }
    recipe = parse_recipe({"name": "bench", "passes": [options], "exports": ["onnx"]})
    header = inspect_model(FolderFiles(model))
    ours, plain = [], []
    for turn in range(3):
        context = PassContext(
            header=header,
            work_dir=scratch / f"steps-{turn}",
            device=device,
            threads=torch.get_num_threads(),
            data_files={"train": rows},
        )
        record = MODEL_PASSES["distill"](model, scratch / f"steps-{turn}-out", recipe.passes[0], context)
        plain.append(plain_loop(model, rows, device, steps))
        ours.append(record.summary["steps_per_second"])
    # The first turn warms the device up for both.
    return {"ours": max(ours[1:]), "plain": max(plain[1:])}


def plain_loop(model: Path, rows: Path, device: str, steps: int) -> float:
    """Steps per second of a simple loop: transformers models, a shuffled DataLoader, AdamW, a linear schedule.

    Rows are tokenized before.
    """
    from torch.nn.utils.rnn import pad_sequence
    from torch.utils.data import DataLoader
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [json.loads(line) for line in read_lines(rows)]
    tokens = tokenizer([text["text"] for text in texts], truncation=True, max_length=96)["input_ids"]
    examples = [(torch.tensor(ids), int(token["label"])) for ids, token in zip(tokens, texts, strict=True)]

    def together(batch: list[tuple[torch.Tensor, int]]) -> Any:
        ids = pad_sequence([row for row, _ in batch], batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones_like(row) for row, _ in batch], batch_first=True)
        return ids, mask, torch.tensor([label for _, label in batch])

    loader = DataLoader(examples, batch_size=32, shuffle=True, drop_last=True, collate_fn=together)  # type: ignore[arg-type]
    teacher = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).to(device).eval()
    student = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).to(device).train()
    student.bert.encoder.layer = torch.nn.ModuleList(student.bert.encoder.layer[at] for at in (0, 2, 4))
    for module in student.modules():  # like our loop: only the embedding tables, not the norm after them
        if isinstance(module, torch.nn.Embedding):
            module.requires_grad_(False)
    learned = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    done, began = 0, time.perf_counter()
    while done < steps:
        for batch in loader:
            ids, mask, labels = (row.to(device) for row in batch)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                with torch.no_grad():
                    answer = teacher(input_ids=ids, attention_mask=mask).logits
                logits = student(input_ids=ids, attention_mask=mask).logits
            soft = torch.nn.functional.kl_div(
                (logits.float() / 2).log_softmax(-1), (answer.float() / 2).softmax(-1), reduction="batchmean"
            )
            loss = 0.5 * 4 * soft + 0.5 * torch.nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                break
    if device == "cuda":
        torch.cuda.synchronize()
    return steps / (time.perf_counter() - began)
