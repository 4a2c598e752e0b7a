"""UNets behind the interface of diffusion networks: the library's own forward, conditions, the middle block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.data.digits import digits
from compressor.diffusion.conditioning import condition_table
from compressor.diffusion.denoiser import Denoiser
from compressor.errors import ModelError
from compressor.models.anatomy.diffusion_nets import diffusion_net
from compressor.models.spec import load_model_spec
from tests.tiny_unets import UNETS, tiny_unet

SAMPLE, TIMESTEP = torch.randn(3, 1, 8, 8), torch.tensor([10.0, 500.0, 999.0])
ROWS = torch.tensor([0, 4, 10])


def library_call(kind: str, module: Any, condition: dict[str, Tensor]) -> Tensor:
    if kind in ("labels", "unconditional"):
        output: Tensor = module(SAMPLE, TIMESTEP, condition.get("class_labels")).sample
        return output
    added = None
    if kind == "sdxl":
        added = {"text_embeds": condition["pooled_projections"], "time_ids": condition["time_ids"]}
    output = module(SAMPLE, TIMESTEP, condition["encoder_hidden_states"], added_cond_kwargs=added).sample
    return output


@pytest.mark.parametrize("kind", UNETS)
@torch.no_grad()
def test_a_unet_gives_what_the_librarys_forward_gives(kind: str) -> None:
    model = tiny_unet(kind)
    net = diffusion_net(model.module)
    condition = condition_table(net, digits().info)(ROWS)
    output = net.forward(SAMPLE, TIMESTEP, condition)
    assert torch.equal(output, library_call(kind, model.module, condition))
    assert output.abs().max() > 0.1


@pytest.mark.parametrize("kind", UNETS)
def test_the_middle_block_is_reached_and_the_decoder_is_not_run(kind: str) -> None:
    model = tiny_unet(kind)
    net = diffusion_net(model.module)
    decoder: list[nn.Module] = []
    model.module.up_blocks[0].register_forward_hook(lambda block, *_: decoder.append(block))  # type: ignore[index]
    sample = SAMPLE.clone().requires_grad_()
    features = net.middle(sample, TIMESTEP, condition_table(net, digits().info)(ROWS))
    assert features.shape == (3, 32, 4, 4)
    assert not decoder
    features.sum().backward()
    assert sample.grad is not None and sample.grad.abs().sum() > 0
    assert not model.module.mid_block._forward_hooks  # type: ignore[union-attr]


def test_conditions_follow_the_configuration() -> None:
    tables = {kind: condition_table(diffusion_net(tiny_unet(kind).module), digits().info) for kind in UNETS}
    assert tables["labels"].fields["class_labels"].tolist() == list(range(11))
    assert tables["unconditional"].fields == {} and tables["unconditional"].null_row is None
    assert tables["text"].fields["encoder_hidden_states"].shape == (11, 2, 32)
    assert tables["sdxl"].fields["pooled_projections"].shape == (11, 24)
    assert (tables["sdxl"].fields["time_ids"] == [64, 64, 0, 0, 64, 64]).all()
    assert {kind: table.null_row for kind, table in tables.items() if kind != "unconditional"} == {
        "labels": 10,
        "text": 10,
        "sdxl": 10,
    }


def test_a_class_for_every_embedding_leaves_no_empty_condition() -> None:
    model = tiny_unet("labels")
    model.module.register_to_config(num_class_embeds=10)  # type: ignore[operator]
    table = condition_table(diffusion_net(model.module), digits().info)
    assert table.null_row is None and table.fields["class_labels"].tolist() == list(range(10))


def test_a_pipelines_unet_loads_with_its_schedule(tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    model = tiny_unet("text")
    model.module.save_pretrained(tmp_path / "unet")  # type: ignore[operator]
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text("{}")
    loaded = Denoiser(load_model_spec(f"diffusers:{tmp_path}"))
    assert loaded.schedule.prediction_type == "v_prediction"
    assert type(loaded.module).__name__ == "UNet2DConditionModel"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("text", {"addition_embed_type": "image"}, "additional embeddings of type 'image' cannot be called here"),
        ("text", {"class_embed_type": "projection"}, "class embeddings of type 'projection' cannot be called here"),
    ],
)
def test_unknown_conditions_are_refused(kind: str, change: dict[str, Any], message: str) -> None:
    model = tiny_unet(kind)
    model.module.register_to_config(**change)  # type: ignore[operator]
    with pytest.raises(ModelError, match=message):
        diffusion_net(model.module).condition_fields()
