"""A report with something in each of its parts, for the tests of what is drawn from it."""

import math
from typing import Any

from core.handoff.report import Report

DIGEST = "sha256:" + "3f9a1c" * 10 + "0b1e"


def full_report(
    name: str = "minilm-l6-sentiment",
    *,
    verdict: str = "accepted",
    recipe: str = "nightly-encoder",
    job: str = "job_01",
) -> Report:
    """Two artifacts of a classifier, with a missed gate if it was rejected."""
    return Report.model_validate(
        {
            "job_id": job,
            "model": {
                "name": name,
                "digest": DIGEST,
                "architecture": "BertForSequenceClassification",
                "model_type": "bert",
                "task": "classification",
                "parameters": 22_713_986,
                "size_bytes": 90_900_000,
                "license": "apache-2.0",
                "base_model": "sentence-transformers/all-MiniLM-L6-v2",
                "language": ["en"],
            },
            "recipe": {"name": recipe, "passes": [{"pass": "distill"}, {"pass": "dynamic-int8"}], "seed": 0},
            "data": [
                {"ref": "reviews", "sha256": "ab" * 32},
                {"ref": "builtin:prose", "sha256": "cd" * 32, "license": "public domain"},
            ],
            "environment": {
                "nightpress": "0.1.0",
                "versions": {
                    "onnxruntime": "1.32.0",
                    "openvino": "2026.4.1",
                    "torch": "2.13.0",
                    "transformers": "5.23.0",
                },
                "cpu": "Intel(R) Xeon(R) Processor @ 2.90GHz",
                "cpu_features": ["avx2", "avx512f", "avx512_vnni"],
                "cores": 2,
                "threads": 2,
                "memory_bytes": 25.2e9,
                "platform": "Linux-6.1-x86_64-with-glibc2.36",
                "device": "cpu",
                "seed": 0,
                "attempt": 1,
            },
            "source": _subject("source", "safetensors", 90_900_000, 0.845, [28.4, 201.0], 812_000_000),
            "artifacts": [
                _subject("onnx", "onnx", 23_000_000, 0.841, [16.5, 118.2], 240_000_000, consumer="onnxruntime 1.32.0"),
                _subject(
                    "openvino", "openvino", 23_600_000, 0.843, [10.3, 70.9], 305_000_000, consumer="openvino 2026.4.1"
                ),
            ],
            "passes": [
                {
                    "index": 0,
                    "name": "distill",
                    "seconds": 812.4,
                    "summary": {},
                    "series": [
                        {
                            "name": label,
                            "x": list(range(0, 400, 10)),
                            "y": [
                                base + 0.9 * math.exp(-step / 90) + 0.03 * math.sin(step) for step in range(0, 400, 10)
                            ],
                        }
                        for label, base in (("train loss", 0.21), ("validation loss", 0.29))
                    ],
                },
                {
                    "index": 1,
                    "name": "dynamic-int8",
                    "seconds": 9.2,
                    "summary": {"format": "onnx"},
                    "layers": [
                        {
                            "name": f"bert.encoder.layer.{at // 6}.{part}",
                            "bytes_before": 589_824 * (4 if "output" in part or "inter" in part else 1),
                            "bytes_after": 147_456 * (4 if "output" in part or "inter" in part else 1),
                            "relative_error": 0.006 + 0.004 * abs(math.sin(at)),
                        }
                        for at, part in enumerate(
                            (
                                "attention.self.query",
                                "attention.self.key",
                                "attention.self.value",
                                "attention.output.dense",
                                "intermediate.dense",
                                "output.dense",
                            )
                            * 6
                        )
                    ],
                },
            ],
            "gates": [_gate(name, verdict) for name in ("onnx", "openvino")],
            "verdict": verdict,
            "phases": {
                "validating": 0.4,
                "baseline": 21.3,
                "pressing": 812.4,
                "exporting": 31.0,
                "verifying": 9.8,
                "evaluating": 44.1,
            },
            "notes": ["Latencies were taken one model after the other on the worker's own processors."],
        }
    )


def _gate(artifact: str, verdict: str) -> dict[str, Any]:
    passed = verdict == "accepted" or artifact == "onnx"
    return {
        "gate": "accuracy >= -2%",
        "artifact": artifact,
        "observed": -0.014 if passed else -0.031,
        "passed": passed,
        "explanation": f"{'-1.40' if passed else '-3.10'}% (lower end of the 95% interval around -0.0047, on reviews)",
    }


def _subject(
    name: str, kind: str, size: int, accuracy: float, p50: list[float], memory: int, consumer: str = ""
) -> dict[str, Any]:
    compared = bool(consumer)
    figures = [_figure("accuracy", accuracy, compared), _figure("f1", accuracy - 0.002, compared)]
    figures += [
        _figure("class_f1", accuracy - shift, compared) | {"of": of}
        for of, shift in (("negative", 0.01), ("positive", -0.01))
    ]
    if compared:
        figures += [
            {
                "name": "top1_agreement",
                "value": 0.981,
                "low": 0.971,
                "high": 0.989,
                "n": 1000,
                "better": "higher",
                "data": "reviews",
            },
            {
                "name": "kl_divergence",
                "value": 0.00213,
                "low": 0.0018,
                "high": 0.00251,
                "n": 1000,
                "unit": "nats",
                "better": "lower",
                "data": "reviews",
            },
        ]
    found: dict[str, Any] = {
        "name": name,
        "format": kind,
        "digest": DIGEST if compared else None,
        "size_bytes": size,
        "parameters": 22_713_986,
        "measurements": figures,
        "peak_memory_bytes": memory,
        "timings": [
            {
                "batch": batch,
                "length": 128,
                "threads": 2,
                "repeats": 20,
                "p50_ms": ms,
                "p95_ms": 1.18 * ms,
                "throughput": 1000 * batch / ms,
                "throughput_unit": "sequences/s",
            }
            for batch, ms in zip((1, 8), p50, strict=True)
        ],
    }
    if compared:
        library = consumer.split()[0]
        found["verification"] = {
            "consumer": consumer,
            "passed": True,
            "measure": "cosine of outputs with the pressed model's, in torch",
            "value": 0.997812,
            "bound": 0.9,
            "seconds": 12.5,
            "load_snippet": f'import {library}\n\nsession = {library}.InferenceSession("{name}/model.onnx", providers=["CPUExecutionProvider"])\n',
        }
        if name == "onnx":
            found["notes"] = ["Slower than the best fp32 runtime at batch 8 × 128 tokens: 118.2 ms against 110.0 ms."]
    return found


def _figure(name: str, value: float, compared: bool) -> dict[str, Any]:
    change = {"change": -0.0047, "change_low": -0.014, "change_high": 0.0036} if compared else {}
    return {
        "name": name,
        "value": value,
        "low": value - 0.022,
        "high": value + 0.021,
        "n": 1000,
        "better": "higher",
        "data": "reviews",
        **change,
    }
