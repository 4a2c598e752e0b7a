"""Engines of fewer bits that are slower than float32 are named."""

from __future__ import annotations

from compressor.profiles.engine_remarks import slower_than_float
from compressor.profiles.latency import summarise
from compressor.profiles.report import EngineEntry


def engine(model: str, target: str, runtime: str, **milliseconds: float) -> EngineEntry:
    whole = {batch.lstrip("b"): summarise([[value] * 5] * 3) for batch, value in milliseconds.items()}
    precision = target.rpartition("-")[2]
    return EngineEntry(model=model, target=target, runtime=runtime, precision=precision, end_to_end=whole)


def test_slower_batch_sizes_are_named_with_both_latencies():
    engines = [
        engine("student", "ort-fp32", "onnxruntime", b1=1.0, b8=6.0),
        engine("student", "ort-int8", "onnxruntime", b1=1.5, b8=4.0),
        engine("teacher", "ort-fp32", "onnxruntime", b1=0.1),
        engine("student", "openvino-int8", "openvino", b1=9.0),
    ]
    assert slower_than_float(engines) == [
        "student on ort-int8 is slower than on ort-fp32: 1.5 against 1 ms at batch 1."
    ]


def test_nothing_is_said_of_faster_or_untimed_engines():
    engines = [
        engine("student", "ort-fp32", "onnxruntime", b1=1.0),
        engine("student", "ort-int8", "onnxruntime", b1=0.5),
        engine("student", "ort-fp16", "onnxruntime"),
    ]
    assert slower_than_float(engines) == []
