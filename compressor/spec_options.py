"""The options at the end of a model's or a data set's spec: ``NAME?key=value,key=value``."""

from __future__ import annotations

import re
from typing import Any

from compressor.errors import RequestError
from compressor.plain_yaml import YAMLError, load_yaml

__all__ = ["split_options"]

# Commas within brackets belong to a value.
_SEPARATOR = re.compile(r"[,&](?![^\[\]{}]*[\]}])")


def split_options(text: str) -> tuple[str, dict[str, Any]]:
    """Take ``NAME?key=value,key=[1,2]`` apart; ``&`` separates as well as a comma, values are YAML.

    Raises:
        RequestError: A key without a value, or a value that cannot be read.
    """
    name, _, query = text.partition("?")
    options: dict[str, Any] = {}
    for pair in filter(None, _SEPARATOR.split(query)):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise RequestError(f"{text}: options are written ?key=value,key=value, not {pair!r}")
        try:
            options[key.strip()] = load_yaml(value)
        except YAMLError as error:
            raise RequestError(f"{text}: the value of {key!r} cannot be read: {value!r}") from error
    return name, options
