"""Latents from a directory, and the condition tables that a model gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compressor.data.digits import digits
from compressor.data.latents import latents
from compressor.data.sources import load_data
from compressor.diffusion.conditioning import condition_table
from compressor.errors import RequestError
from compressor.models.anatomy.blocks import block_stack
from tests.tiny_transformers import tiny


def write(directory: Path, name: str = "train", count: int = 20, **extra: torch.Tensor) -> None:
    torch.manual_seed(0)
    tensors = {"latents": torch.randn(count, 1, 8, 8), "encoder_hidden_states": torch.randn(count + 1, 3, 32), **extra}
    save_file(tensors, str(directory / f"{name}.safetensors"), {"null_row": str(count)})


def test_one_file_is_split_into_disjoint_parts(tmp_path: Path) -> None:
    write(tmp_path)
    parts = [latents(tmp_path, split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [14, 2, 4]
    rows = np.concatenate([part.fields["label"] for part in parts])
    assert sorted(rows) == list(range(20))
    assert load_data(f"latents:{tmp_path}", "train").info.fingerprint == parts[0].info.fingerprint


def test_own_split_files_are_taken_whole(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, "test", 6)
    assert len(latents(tmp_path, "test")) == 6
    assert len(latents(tmp_path, "train")) == 20


def test_table_gives_every_sample_its_own_prompt(tmp_path: Path) -> None:
    write(tmp_path)
    data = latents(tmp_path)
    table = condition_table(block_stack(tiny("QwenImageTransformer2DModel").module), data.info)
    rows = torch.tensor([data[3]["label"], 20])
    assert torch.equal(
        table(rows)["encoder_hidden_states"],
        torch.from_numpy(data.info.extra["conditions"]["encoder_hidden_states"])[rows],
    )
    assert table.null_row == 20


def test_labelled_set_gets_fixed_random_prompts_and_an_empty_one() -> None:
    stack = block_stack(tiny("FluxTransformer2DModel").module)
    table, again = (condition_table(stack, digits().info, text_tokens=2) for _ in range(2))
    assert table.fields["encoder_hidden_states"].shape == (11, 2, 32)
    assert table.fields["pooled_projections"].shape == (11, 24)
    assert table.null_row == 10 and not table.fields["encoder_hidden_states"][10].any()
    assert all(np.array_equal(table.fields[name], again.fields[name]) for name in table.fields)


def test_class_conditional_model_gets_class_numbers() -> None:
    table = condition_table(block_stack(tiny("DiTTransformer2DModel").module), digits().info)
    assert table.fields["class_labels"].tolist() == [*range(10), 10]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"latents": torch.randn(20, 8, 8)}, r"needs a tensor `latents` of shape \(N, C, H, W\)"),
        ({"latents": torch.full((20, 1, 8, 8), float("nan"))}, "holds NaN or infinity"),
        ({"label": torch.arange(3)}, "20 latents and 3 labels"),
        ({"label": torch.full((20,), 40)}, "every label needs a row"),
    ],
)
def test_inconsistent_file_is_refused(tmp_path: Path, extra: dict[str, torch.Tensor], message: str) -> None:
    write(tmp_path, **extra)
    with pytest.raises(RequestError, match=message):
        latents(tmp_path)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "train.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RequestError, match=r"train\.safetensors is damaged"):
        latents(tmp_path)


def test_directory_without_latents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"holds no train\.safetensors"):
        latents(tmp_path)


def test_tables_of_another_width_are_refused(tmp_path: Path) -> None:
    write(tmp_path, encoder_hidden_states=torch.randn(21, 3, 48))
    with pytest.raises(RequestError, match=r"rows of shape \(3, 48\), the model takes \('tokens', 32\)"):
        condition_table(block_stack(tiny("QwenImageTransformer2DModel").module), latents(tmp_path).info)


def test_unknown_data_is_refused_with_what_there_is() -> None:
    with pytest.raises(RequestError, match=r"unknown data 'digit': did you mean digits"):
        load_data("digit", "train")
