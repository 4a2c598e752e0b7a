"""Rotary embeddings kept as complex numbers cannot be exported, or lose their imaginary parts on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.deployable import Graph
from compressor.exporters.onnx_graph import evaluation_form

TOKENS, WIDTH = 6, 8


def angles(tokens: int = TOKENS) -> Tensor:
    return torch.outer(torch.arange(float(tokens)), 1 / 100 ** (torch.arange(0, WIDTH, 2) / WIDTH))


class Rotary(nn.Module):
    """Attention whose queries and keys are turned by a complex table; ``form`` says how the table is reached."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.qkv = form, nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("table", torch.polar(torch.ones(TOKENS, WIDTH // 2), angles()))

    def turn(self, x: Tensor) -> Tensor:
        numbers = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        turned = {
            "buffer": lambda: numbers * self.table[None],
            "sliced": lambda: numbers * self.table[: x.shape[1]],
            "gathered": lambda: numbers * self.table[(x[..., 0] > 0).long()],
            "chosen": lambda: torch.where(x[..., :1] > 0, numbers * self.table, numbers),
            "repeated": lambda: (numbers.unsqueeze(1).repeat(1, 2, 1, 1) * self.table).select(1, -1),
            "halves": lambda: torch.cat([part * self.table[:, :2] for part in numbers.split(2, -1)], -1),
            "exponential": lambda: numbers * torch.exp(torch.complex(torch.zeros_like(x[..., ::2]), x[..., 1::2])),
        }[self.form]()
        return torch.view_as_real(turned).flatten(-2).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(self.turn(query), self.turn(key), value)


@pytest.mark.parametrize("form", ["buffer", "gathered", "chosen", "repeated", "halves", "exponential"])
def test_complex_rotary_is_exported_in_real_arithmetic_and_equals_the_module(exported, form):
    module = Rotary(form).eval()
    assert exported(module, {"x": torch.randn(2, TOKENS, WIDTH)}).near(module, x=torch.randn(3, TOKENS, WIDTH))


def test_complex_table_serves_any_number_of_tokens_when_they_are_dynamic(exported):
    module = Rotary("sliced").eval()
    made = exported(module, {"x": torch.randn(2, 3, WIDTH)}, dynamic={"x": {0: "batch", 1: "tokens"}})
    assert made.entry.inputs[0].shape == ("batch", "tokens", WIDTH)
    assert made.near(module, x=torch.randn(3, TOKENS, WIDTH))


def test_complex_table_keeps_its_imaginary_part_when_the_weights_are_halves():
    module = Rotary("buffer").eval()
    for parameter in module.parameters():
        parameter.data = parameter.data.half()
    with evaluation_form(Graph(module, {"x": torch.randn(2, TOKENS, WIDTH).half()}, ("y",))) as plain:
        assert plain.module.qkv.weight.dtype == torch.float32
        assert torch.equal(plain.module.table, module.table)
