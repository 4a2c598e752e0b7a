"""Classifiers of timm, torchvision and transformers: loaded by their specs, saved, and built again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from compressor.errors import CompressorError, ModelError
from compressor.models.classifier import Classifier
from compressor.models.model import Model, load_model, save_model
from compressor.models.spec import load_model_spec

TINY_RESNET = "timm:resnet18?layers=[1,1,1,1],channels=[8,8,8,16],num_classes=4,in_chans=1"


def tiny_vit_config(**changes: object) -> ViTConfig:
    values = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTConfig(**values | {"image_size": 16, "patch_size": 8, "num_labels": 4} | changes)


def logits(model: Model, size: int = 16, channels: int = 3) -> torch.Tensor:
    pixels = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return Classifier(Model(model.module.eval(), model.info))(pixels)


@pytest.mark.parametrize(
    "spec",
    [
        TINY_RESNET,
        "timm:mobilenetv3_small_050?num_classes=4",
        "timm:vit_tiny_patch16_224?num_classes=4,img_size=16,patch_size=8,embed_dim=16,depth=2,num_heads=2",
        "torchvision:resnet18?num_classes=4",
        "transformers:{folder}",
    ],
)
def test_a_saved_model_is_the_same_when_it_is_loaded_again(tmp_path: Path, spec: str) -> None:
    ViTForImageClassification(tiny_vit_config()).save_pretrained(tmp_path / "vit")
    model = load_model_spec(spec.format(folder=tmp_path / "vit"))
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    channels = model.info.extra["channels"]
    assert torch.equal(logits(again, channels=channels), logits(model, channels=channels))
    assert again.info == model.info


def test_random_weights_are_never_downloaded_ones() -> None:
    first, second = load_model_spec(TINY_RESNET), load_model_spec(TINY_RESNET)
    assert not torch.equal(first.module.conv1.weight, second.module.conv1.weight)


def test_the_normalisation_of_the_library_travels_with_the_model() -> None:
    assert load_model_spec("timm:resnet18").info.extra["mean"] == [0.485, 0.456, 0.406]
    assert load_model_spec("timm:vit_tiny_patch16_224").info.extra["mean"] == [0.5, 0.5, 0.5]
    assert load_model_spec("torchvision:resnet18").info.extra["std"] == [0.229, 0.224, 0.225]
    assert load_model_spec(TINY_RESNET).info.extra["mean"] == [pytest.approx(0.449)]
    changed = load_model_spec(TINY_RESNET + ",mean=[0.25],std=0.5")
    assert (changed.info.extra["mean"], changed.info.extra["std"]) == ([0.25], [0.5])


def test_the_preprocessing_of_a_transformers_folder_is_read(tmp_path: Path) -> None:
    ViTForImageClassification(tiny_vit_config()).save_pretrained(tmp_path)
    facts = {"do_rescale": True, "rescale_factor": 2 / 255, "do_normalize": True}
    facts |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    extra = load_model_spec(f"transformers:{tmp_path}").info.extra
    assert extra["mean"] == pytest.approx([0.2, 0.25, 0.3])
    assert extra["std"] == pytest.approx([0.1, 0.15, 0.2])
    assert extra["size"] == [16, 16]


def test_a_checkpoint_file_gives_its_weights_and_number_of_classes(tmp_path: Path) -> None:
    trained = timm.create_model("resnet18", num_classes=7)
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}}, tmp_path / "w.pth"
    )
    for name in ("weights.safetensors", "w.pth"):
        model = load_model_spec(f"timm:resnet18@{tmp_path / name}", defaults={"num_classes": 3})
        assert model.info.config["num_classes"] == 7
        assert torch.equal(model.module.fc.weight, trained.fc.weight)


def test_a_torchvision_checkpoint_is_loaded(tmp_path: Path) -> None:
    trained = load_model_spec("torchvision:mobilenet_v3_small?num_classes=5").module
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    model = load_model_spec(f"torchvision:mobilenet_v3_small@{tmp_path / 'w.pth'}")
    assert torch.equal(model.module.classifier[3].weight, trained.classifier[3].weight)


def test_a_folder_of_timm_and_our_own_folder_are_loaded_as_timm_itself_loads_them(tmp_path: Path) -> None:
    model = load_model_spec(TINY_RESNET)
    save_model(model, tmp_path / "student")
    for spec in (f"timm:{tmp_path / 'student'}", f"timm:local-dir:{tmp_path / 'student'}"):
        assert torch.equal(logits(load_model_spec(spec), channels=1), logits(model, channels=1))
    theirs = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True)
    assert torch.equal(theirs.fc.weight, model.module.fc.weight)


def test_our_folder_of_a_transformers_model_is_loaded_by_transformers(tmp_path: Path) -> None:
    ViTForImageClassification(tiny_vit_config()).save_pretrained(tmp_path / "vit")
    model = load_model_spec(f"transformers:{tmp_path / 'vit'}")
    save_model(model, tmp_path / "student")
    theirs = ViTForImageClassification.from_pretrained(tmp_path / "student")
    assert torch.equal(theirs.classifier.weight, model.module.classifier.weight)
    assert load_model_spec(f"transformers:{tmp_path / 'student'}").info.extra["mean"] == model.info.extra["mean"]


def test_a_student_takes_classes_and_channels_from_the_data_when_its_spec_leaves_them_open(tmp_path: Path) -> None:
    defaults = {"num_classes": 6, "in_chans": 1}
    assert load_model_spec("timm:resnet18", defaults=defaults).module.conv1.in_channels == 1
    assert load_model_spec("timm:resnet18?num_classes=9", defaults=defaults).module.num_classes == 9
    assert load_model_spec("torchvision:resnet18", defaults=defaults).module.fc.out_features == 6
    tiny_vit_config().save_pretrained(tmp_path)
    vit = load_model_spec(f"transformers:{tmp_path}?pretrained=false", defaults=defaults)
    assert (vit.module.num_labels, vit.module.config.num_channels) == (6, 1)


def test_a_kind_of_transformers_models_is_a_new_model_of_the_datas_classes() -> None:
    sizes = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,img_size=8,patch_size=4"
    vit = load_model_spec(f"transformers:vit?{sizes}", defaults={"num_classes": 6, "in_chans": 1})
    assert vit.info.architecture == "ViTForImageClassification"
    assert (vit.module.num_labels, vit.info.extra["channels"], vit.info.extra["size"]) == (6, 1, [8, 8])


def test_a_transformers_folder_without_a_head_is_refused_unless_a_new_one_is_asked_for(tmp_path: Path) -> None:
    ViTModel(tiny_vit_config()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no trained classifier.*classifier\.bias"):
        load_model_spec(f"transformers:{tmp_path}")
    assert load_model_spec(f"transformers:{tmp_path}?num_classes=3").module.num_labels == 3


def test_class_names_of_a_transformers_model_are_known(tmp_path: Path) -> None:
    names = {k: name for k, name in enumerate("dcba")}
    ViTForImageClassification(tiny_vit_config(id2label=names)).save_pretrained(tmp_path)
    assert load_model_spec(f"transformers:{tmp_path}").info.extra["classes"] == ["d", "c", "b", "a"]


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match="would run code"):
        load_model_spec(f"timm:resnet18@{tmp_path / 'evil.pth'}")
    assert "code ran" not in capsys.readouterr().out


def test_a_checkpoint_of_another_architecture_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    save_file(nn.Linear(3, 4).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"does not fit ResNet.*missing.*unknown"):
        load_model_spec(f"timm:resnet18@{tmp_path / 'w.safetensors'}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:resnet81", "did you mean.*resnet18"),
        ("timm:resnet18.nope?pretrained=true", "timm:resnet18.nope cannot be made"),
        ("timm:resnet18?wombat=3", "wombat"),
        ("timm:resnet18?num_classes", "key=value"),
        ("timm:resnet18?mean=[a]", "one number a channel"),
        ("timm:resnet18@nowhere.safetensors", "no checkpoint nowhere"),
        ("torchvision:resnet81", "did you mean.*resnet18"),
        ("torchvision:resnet18?in_chans=1", "colour images only"),
        ("transformers:./nowhere", "no such directory"),
        ("transformers:.", "config.json"),
        ("tim:resnet18", "did you mean timm"),
        ("timm:", "lacks a name"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(CompressorError, match=message) as caught:
        load_model_spec(spec)
    assert "\n" not in str(caught.value)


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(timm.create_model("resnet18").state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"w\.safetensors is truncated"):
        load_model_spec(f"timm:resnet18@{path}")
