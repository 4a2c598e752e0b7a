"""Layers named by patterns."""

from __future__ import annotations

import pytest

from compressor.errors import RequestError
from compressor.layer_patterns import check_patterns, lies_in


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("head", "head", True),
        ("head", "heads", False),
        ("head", "module.head", False),
        ("blocks.0", "blocks.0.attn.qkv", True),
        ("blocks.0", "blocks.01.attn", False),
        ("blocks.*.mlp", "blocks.3.mlp.fc1", True),
        ("blocks.?", "blocks.3.mlp.fc1", True),
        ("blocks.?", "blocks.11", False),
        ("*.fc1", "blocks.3.mlp.fc1", True),
        ("HEAD", "head", False),
    ],
)
def test_pattern_names_a_layer_and_all_that_lies_in_it(pattern: str, path: str, expected: bool) -> None:
    assert lies_in(path, [pattern]) is expected
    assert lies_in(path, ["none", pattern]) is expected and not lies_in(path, [])


def test_pattern_that_names_nothing_is_refused_with_the_nearest() -> None:
    paths = ["", "stem", "blocks", "blocks.0", "head"]
    check_patterns(["head", "blocks.*"], paths, "qat.exclude")
    with pytest.raises(RequestError, match=r"qat.exclude: the model has no layer 'haed': did you mean head\?"):
        check_patterns(["haed"], paths, "qat.exclude")
