"""The task image-generation: its options."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.errors import RequestError
from compressor.tasks.image_generation import ImageGeneration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "task_options.num_inference_steps is 0: must be greater than or equal to 1"),
        ({"guidance": 2.0}, "unknown key 'task_options.guidance': did you mean task_options.guidance_scale"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ImageGeneration({"train": "digits"}, options)
