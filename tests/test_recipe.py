"""A recipe: flags and files are two ways to write it, it resolves to itself, and every mistake is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import RequestError
from compressor.plain_yaml import dump_yaml, load_yaml
from compressor.recipe import Recipe, load_recipe_target, parse_sparsity
from compressor.recipe_resolution import Flags, parse_settings


def resolve(text: str = "", **flags: Any) -> Recipe:
    """A recipe of the YAML text and the flags."""
    return Recipe.parse(load_yaml(text) or {}).resolve(Flags(**flags))


def refusal(text: str = "", **flags: Any) -> str:
    with pytest.raises(RequestError) as caught:
        resolve(text, **flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- YAML ------------------------------------------------------------------------------------------------------------


def test_yaml_reads_what_people_mean() -> None:
    text = "a: 2:4\nb: 1e-4\nc: on\nd: 010\ne: [1, 2.5]\nf:\ng: true\nh: .5"
    assert load_yaml(text) == {
        "a": "2:4", "b": 1e-4, "c": "on", "d": 10, "e": [1, 2.5], "f": None, "g": True, "h": 0.5,
    }  # fmt: skip


def test_yaml_key_written_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("seed: 1\nseed: 2\n")
    with pytest.raises(RequestError, match=r"not valid YAML: the key 'seed' stands twice \(line 2\)"):
        Recipe.from_yaml(tmp_path / "r.yaml")


text = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), max_size=9)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text
nested = st.recursive(plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3), max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(text, nested, max_size=4))
def test_yaml_round_trips_any_json_value(value: dict[str, Any]) -> None:
    assert load_yaml(dump_yaml(value)) == value


# --- resolving -------------------------------------------------------------------------------------------------------


def test_default_recipe_of_ppcl_is_complete() -> None:
    recipe = Recipe(methods=["ppcl"]).resolve()
    assert recipe.task == "image-generation"
    assert recipe.teachers == {"teacher": ["demo:digits-mmdit"]}
    assert recipe.data == {"train": "digits"}
    assert recipe.methods[0].config["keep"] == 0.5
    assert recipe.methods[0].build().name == "ppcl"


def test_what_suits_the_default_data_alone_is_left_out_with_others(toy_methods: None) -> None:
    usual, other = resolve(methods=["toy"]), resolve(methods=["toy"], data=["imagefolder:photos"])
    own = type(usual.methods[0].build().config)()  # type: ignore[attr-defined]
    assert usual.methods[0].config["names"] == ["digits"]
    assert other.methods[0].config["names"] == own.model_dump(mode="json")["names"] != ["digits"]
    assert usual.methods[0].config["keep"] == other.methods[0].config["keep"] == 0.25
    assert resolve(methods=["toy"], teachers=["run:mine"]).methods[0].config["names"] == ["digits"]


def test_a_resolved_recipe_resolves_to_itself_and_survives_a_file(toy_methods: None, tmp_path: Path) -> None:
    recipe = resolve(methods=["toy", "toy-next"], settings=["part.lr=1e-4", "names=[a, 'on']"], targets=["trt-fp16"])
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").resolve() == recipe


def test_flags_and_file_give_the_same_recipe(toy_methods: None) -> None:
    by_flags = resolve(
        methods=["toy"], targets=["trt-fp16", "ort-fp32"], teachers=["diffusers:/a/b=c"], data=["imagefolder:/d"],
        steps=3, budget=0.5, seed=7, device="cpu", trust_remote_code=True,
        settings=["keep=0.75", "part.lr=0.25", "evaluation.samples=100", "benchmark.batches=[1, 4]"],
    )  # fmt: skip
    by_file = resolve("""
        methods:
          - name: toy
            config: {keep: 0.75, part: {lr: 0.25}}
        targets: [trt-fp16, ort-fp32]
        teachers: {teacher: ['diffusers:/a/b=c']}
        data: {train: 'imagefolder:/d'}
        steps: 3
        budget: 0.5
        seed: 7
        device: cpu
        trust_remote_code: true
        evaluation: {samples: 100}
        benchmark: {batches: [1, 4]}
    """)
    assert by_flags == by_file


def test_short_forms_of_a_file_mean_the_long_ones(toy_methods: None) -> None:
    short = resolve("{methods: toy, teachers: 'run:a', data: digits, targets: trt-fp16}")
    long = resolve(
        "{methods: [{name: toy}], teachers: {teacher: ['run:a']}, data: {train: digits}, targets: [trt-fp16]}"
    )
    assert short == long


def test_layers_go_method_file_flags_settings(toy_methods: None) -> None:
    file = "{methods: [{name: toy, config: {keep: 0.3, mode: slow}}], seed: 1, budget: 2.0}"
    recipe = resolve(file, methods=["toy"], seed=2, settings=["keep=0.4", "seed=3"])
    config = recipe.methods[0].config
    assert (config["keep"], config["mode"], config["part"]) == (0.4, "slow", {"steps": 20, "lr": 0.5})
    assert (recipe.seed, recipe.budget) == (3, 2.0)
    assert resolve("methods: toy").methods[0].config["keep"] == 0.25  # the method's default recipe, not the Config's


def test_a_chain_takes_the_first_methods_data_and_the_roles_that_later_ones_add(toy_methods: None) -> None:
    recipe = resolve(methods=["toy", "toy-next"])
    assert recipe.data == {"train": "digits", "pairs": "digits"}
    assert recipe.teachers == {"teacher": ["demo:x"]}


def test_settings_go_to_the_last_method_that_has_the_key(toy_methods: None) -> None:
    recipe = resolve(methods=["toy", "toy-next"], settings=["lr=0.7", "keep=1", "toy.part.lr=0.2", "recipe.budget=3"])
    assert recipe.methods[1].config["lr"] == 0.7
    assert recipe.methods[0].config["keep"] == 1
    assert recipe.methods[0].config["part"] == {"steps": 20, "lr": 0.2}
    assert recipe.budget == 3


def test_steps_stand_with_the_method_whose_only_training_phase_they_are(toy_methods: None) -> None:
    for recipe in (
        resolve(methods=["toy"], steps=3),
        resolve("{methods: toy, steps: 3}"),
        resolve("{methods: toy, steps: 9}", steps=3),
        resolve("{methods: [{name: toy, config: {part: {steps: 9}}}]}", steps=3),
        resolve(methods=["toy"], settings=["recipe.steps=3"]),
    ):
        assert (recipe.steps, recipe.methods[0].config["part"]["steps"]) == (None, 3)
    assert resolve(methods=["toy"], steps=3, settings=["part.steps=5"]).methods[0].config["part"]["steps"] == 5
    assert resolve(methods=["kd"], settings=["steps=3"]) == resolve(methods=["kd"], steps=3)


def test_roles_of_flags(toy_methods: None) -> None:
    recipe = resolve(
        methods=["toy-own"], teachers=["a=run:one", "a=run:two", "b=run:x=y"], data=["digits"], settings=["pattern=p"]
    )
    assert recipe.teachers == {"a": ["run:one", "run:two"], "b": ["run:x=y"]}
    recipe = resolve(methods=["toy-next"], data=["pairs=coco:/d"], students=["timm:small"])
    assert recipe.data == {"train": "other", "pairs": "coco:/d"}
    assert recipe.students == {"student": "timm:small"}


def test_target_may_be_a_mapping(toy_methods: None) -> None:
    recipe = resolve("{methods: toy, targets: [{base: trt-fp16, name: big, batch: {max: 32, benchmark: [1]}}]}")
    target = recipe.load_targets()[0]
    assert (target.name, target.batch.max, target.runtime) == ("big", 32, "tensorrt")
    assert load_recipe_target({"runtime": "onnxruntime"}).name == "onnxruntime-fp32"


def test_max_drop_is_that_of_every_target_of_eight_bits_and_of_no_other(toy_methods: None) -> None:
    text = """
        methods: toy
        targets:
          - ort-fp32
          - ort-int8
          - trt-fp8
          - {base: openvino-int8, name: dotted, calibration.max_drop: 0.5, calibration.samples: 32}
          - {runtime: onnxruntime, precision: int8, name: whole, calibration: {samples: 64}}
    """
    usual, recipe = resolve(text), resolve(text, max_drop=0.003)
    found = {target.name: target.calibration for target in recipe.load_targets()}
    assert list(found) == [target.name for target in usual.load_targets()]
    assert {name: one.max_drop for name, one in found.items() if name != "ort-fp32"} == {
        name: 0.003 for name in ("ort-int8", "trt-fp8", "dotted", "whole")
    }
    assert (found["dotted"].samples, found["whole"].samples, found["ort-int8"].weight_bits) == (32, 64, 7)
    assert recipe.targets[0] == "ort-fp32"
    again = Recipe.parse(recipe.to_dict())
    assert again.resolve(Flags(max_drop=0.003)) == again.resolve() == recipe


@pytest.mark.parametrize(
    ("text", "plain_form"),
    [("2:4", "2:4"), ("0.8", "0.8"), (".80", "0.8"), ("block:32x32:0.8", "block:32x32:0.8"), (" 1:2 ", "1:2")],
)
def test_sparsity_patterns(text: str, plain_form: str) -> None:
    assert parse_sparsity(text) == plain_form


@pytest.mark.parametrize("text", ["4:2", "0:4", "1.0", "0.0", "block:0x32:0.5", "block:32:0.5", "half", "2:4:8"])
def test_wrong_sparsity_patterns_are_refused(text: str) -> None:
    assert "sparsity is " in refusal(methods=["ppcl"], sparsity=text)


def test_sparsity_becomes_the_last_method_of_the_chain(toy_methods: None) -> None:
    recipe = resolve(methods=["toy"], sparsity="2:4")
    assert [(entry.name, entry.config.get("pattern")) for entry in recipe.methods] == [
        ("toy", None),
        ("sparsity", "2:4"),
    ]
    assert recipe.sparsity is None
    assert recipe.resolve() == recipe
    assert resolve("{methods: toy, sparsity: 2:4}") == recipe


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"methods": ["tooy"]}, "unknown method 'tooy': did you mean toy?"),
        ({}, "no method is given: add --method NAME"),
        ({"targets": ["trt-fp61"]}, "no target 'trt-fp61': did you mean trt-fp16"),
        ({"targets": ["trt-fp16", "trt-fp16"]}, "two targets are named 'trt-fp16'"),
        ({"targets": ["trt-fp16"], "max_drop": 0.1}, "--max-drop limits int8 and fp8 targets, and none is given"),
        ({"targets": ["ort-int8"], "max_drop": -1.0}, "ort-int8: calibration.max_drop: Input should be greater than"),
        ({"teachers": ["techer=run:a"]}, "--teacher techer=run:a: unknown role 'techer': did you mean teacher?"),
        ({"teachers": ["run:a", "run:b"]}, "the method 'toy' takes one teacher, but 2 are given"),
        ({"teachers": ["teacher="]}, "--teacher teacher=: the spec is missing"),
        ({"data": ["a", "b"]}, "--data train is given 2 times; it takes one"),
        ({"students": ["timm:x"]}, "the method 'toy' takes no --student: it copies it from its teacher"),
        ({"device": "cudda"}, "device is 'cudda': must be a device: did you mean cuda"),
        ({"seed": -1}, "seed is -1: must be greater than or equal to 0"),
        ({"budget": 0.0}, "budget is 0.0: must be greater than 0"),
        ({"settings": ["keep"]}, "--set keep: write --set KEY=VALUE"),
        ({"settings": ["keep={"]}, "--set keep={: the value is not valid YAML"),
        ({"settings": ["keep=2"]}, "toy.keep is 2: must be less than or equal to 1"),
        ({"settings": ["kep=1"]}, "--set kep=1: unknown key 'kep': did you mean keep?"),
        ({"settings": ["toy.kep=1"]}, "--set toy.kep=1: unknown key 'toy.kep': did you mean keep?"),
        ({"settings": ["part.step=1"]}, "--set part.step=1: unknown key 'part.step': did you mean part.steps?"),
        ({"settings": ["samples=9"]}, "unknown key 'samples': did you mean evaluation.samples?"),
        ({"settings": ["evaluation.samples=9"]}, "evaluation.samples is 9: must be greater than or equal to 10"),
        ({"methods": ["fitnet"], "steps": 3}, "--steps suits methods of one training phase; fitnet has "),
        ({"steps": -3}, "steps is -3: must be greater than or equal to 1"),
        ({"settings": ["budget=2"]}, "'budget' is ambiguous: write recipe.budget or toy.budget"),
        ({"settings": ["names={a: 1}"]}, "toy.names is {'a': 1}: must be a valid list or a valid integer"),
        ({"settings": ["mode=quick"]}, "toy.mode is 'quick': must be 'fast' or 'slow'"),
        ({"settings": ["methods=x"]}, "--method chooses methods"),
        ({"settings": ["sparsity=2:4"]}, "write --sparsity 2:4"),
        ({"settings": ["task=image-gen"]}, "does not serve the task 'image-gen': did you mean image-generation?"),
        ({"settings": ["name=a/b"]}, "name is 'a/b': must be made of letters"),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_in_one_line(toy_methods: None, flags: dict[str, Any], message: str) -> None:
    chosen = {"methods": ["toy"]} | flags if flags else {}
    assert message in refusal(**chosen)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{methods: toy, evalution: {samples: 100}}", "unknown key 'evalution': did you mean evaluation?"),
        ("{methods: toy, samples: 100}", "unknown key 'samples': did you mean evaluation.samples?"),
        ("{methods: [{nme: toy}]}", "methods.0.name is missing"),
        ("{methods: 3}", "methods is 3: must be a valid list"),
        ("{methods: toy, evaluation: {sample: 100}}", "'evaluation.sample': did you mean evaluation.samples?"),
        ("{methods: toy, benchmark: {batches: [0]}}", "benchmark.batches.0 is 0: must be greater than or equal to 1"),
        ("{methods: toy, targets: [{base: trt-fp16, bach: 1}]}", "no key 'bach': did you mean batch"),
        ("{methods: toy, targets: [{runtime: openvinoo}]}", "no runtime 'openvinoo': did you mean openvino?"),
        ("{methods: toy, teachers: {tutor: 'run:a'}}", "teachers: unknown role 'tutor'"),
        ("{methods: [{name: toy, config: {kep: 1}}]}", "unknown key 'toy.kep': did you mean toy.keep?"),
        ("{methods: [{name: toy, config: {part: {lrr: 1}}}]}", "unknown key 'toy.part.lrr': did you mean toy.part.lr?"),
        ("{methods: toy-own, teachers: {b: 'run:x'}, data: digits}", "toy-own.pattern is missing"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused_in_one_line(toy_methods: None, text: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        Recipe.parse(load_yaml(text)).resolve()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_roles_are_refused(toy_methods: None) -> None:
    settings = ["pattern=p"]
    assert "needs a teacher: add --teacher a=SPEC" in refusal(methods=["toy-own"], data=["digits"], settings=settings)
    given = {"methods": ["toy-own"], "settings": settings, "teachers": ["a=run:x", "b=run:y"]}
    assert "needs data: add --data SPEC" in refusal(**given)
    assert "say which role: --teacher a=SPEC or --teacher b=SPEC" in refusal(**given | {"teachers": ["run:x"]})


def test_a_method_that_builds_its_own_student_cannot_follow_another(toy_methods: None) -> None:
    given = {"teachers": ["a=run:x", "b=run:y"], "settings": ["pattern=p"]}
    assert "the method 'toy-own' cannot follow 'toy'" in refusal(methods=["toy", "toy-own"], **given)
    assert len(resolve(methods=["toy-own", "toy"], **given).methods) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- toy", "must be a mapping of keys, not a list"),
        ("seed: x", "seed is 'x': must be a valid integer"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(RequestError) as caught:
        Recipe.from_yaml(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot read the recipe .*: No such file"):
        Recipe.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="is not valid YAML"):
        Recipe.from_yaml(tmp_path / "binary.yaml")


def test_parse_settings_reads_yaml_values() -> None:
    assert parse_settings(["keep=0.5", "active=[1, 4]", "name=a=b"]) == {"keep": 0.5, "active": [1, 4], "name": "a=b"}


# --- the run directory's name ----------------------------------------------------------------------------------------


def test_default_directory_is_the_same_for_the_same_training_and_another_for_another(toy_methods: None) -> None:
    usual = resolve(methods=["toy"]).default_directory()
    assert usual == Path("runs/toy-digits")
    assert resolve(methods=["toy"], targets=["trt-fp16"]).default_directory() == usual
    mine = resolve(methods=["toy"], settings=["keep=0.75"]).default_directory()
    assert mine != usual
    assert mine == resolve("{methods: [{name: toy, config: {keep: 0.75}}]}").default_directory()
    own = resolve(methods=["toy"], data=["imagefolder:/data/my cats/"]).default_directory()
    assert own.name.startswith("toy-my-cats-")
    for spec, name in {"scenes:32?masks=true": "scenes-32-masks-true", "digits:16": "digits-16"}.items():
        assert resolve(methods=["toy"], data=[spec]).default_directory().name.startswith(f"toy-{name}-")
    assert resolve(methods=["toy"], settings=["name=mine"]).default_directory() == Path("runs/mine")
