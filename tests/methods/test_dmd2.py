"""DMD2 on real networks: who is trained by what, in which order, on what, and what comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.diffusion.denoiser import Denoiser
from compressor.errors import RequestError
from compressor.measurement import LoadedEngine, torch_driver
from compressor.methods.generation.dmd2 import DMD2, DMD2Config
from compressor.methods.generation.ppcl import PPCL, PPCLConfig
from compressor.methods.generation.ppcl import Stage as PPCLStage
from compressor.models.model import Model, load_model, save_model
from compressor.tasks.image_generation import ImageGeneration
from compressor.training.phase import Train, Update
from compressor.training.random import Randomness
from tests.method_runs import Killed, Trained, run_method
from tests.tiny_transformers import tiny
from tests.tiny_unets import UNETS, tiny_unet

QWEN = "QwenImageTransformer2DModel"
STAGES: dict[str, Any] = {
    "match": {"steps": 3, "lr": 1e-3, "fake_lr": 1e-3, "warmup": 0},
    "adversarial": {"steps": 2, "lr": 1e-3, "fake_lr": 1e-3, "warmup": 0},
}


@dataclass
class Watched:
    """Every update of a training: its phase, and the weights around it."""

    updates: list[tuple[str, int, Update]] = field(default_factory=list)
    before: list[dict[str, Tensor]] = field(default_factory=list)


@dataclass
class Watching(Trained):
    """What a training left."""

    seen: Watched


def teacher_model(name: str = QWEN, layers: int = 2, **extra: Any) -> Model:
    if name in UNETS:
        return tiny_unet(name, **extra)
    return tiny(name, layers=layers).model(**extra)


def train(
    directory: Path,
    teacher: Model,
    *,
    chained: Model | None = None,
    kill: tuple[str, int] | None = None,
    data: str = "digits",
    **config: Any,
) -> Watching:
    method = DMD2(DMD2Config.model_validate({"num_steps": 2, "fake_updates": 2, "batch": 4, **STAGES, **config}))
    seen, task = Watched(), ImageGeneration({"train": data}, {})

    def watch(phase: Train) -> None:
        phase.step = watched_step(method, phase.name, phase.step, seen)

    done = run_method(directory, method, task, teachers=[teacher], chained=chained, kill=kill, watch=watch)
    return Watching(method, done.ctx, done.history, seen)


def watched_step(method: DMD2, name: str, step: Any, seen: Watched) -> Any:
    def wrapped(batches: Any, i: int) -> Iterator[Update]:
        inner, answer = step(batches, i), None
        while True:
            try:
                update = inner.send(answer)
            except StopIteration:
                return
            seen.updates.append((name, i, update))
            seen.before.append(snapshot(method))
            answer = yield update

    return wrapped


def snapshot(method: DMD2) -> dict[str, Tensor]:
    parts = {"real": method._real, "generator": method._generator, "fake": method._fake, "head": method._head}
    return {part: torch.cat([p.detach().flatten().clone() for p in net.parameters()]) for part, net in parts.items()}


def weights(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


# --- order and ownership ---------------------------------------------------------------------------------------------


def test_generator_is_updated_before_the_fake_score_in_every_kth_iteration(tmp_path: Path) -> None:
    seen = train(tmp_path, teacher_model(), fake_updates=2).seen
    owners = [(name, i, update.owner, sorted(update.losses)) for name, i, update in seen.updates]
    assert owners == [
        ("match", 0, "generator", ["matching"]),
        ("match", 0, "fake", ["score"]),
        ("match", 1, "fake", ["score"]),
        ("match", 2, "generator", ["matching"]),
        ("match", 2, "fake", ["score"]),
        ("adversarial", 0, "generator", ["gan", "matching"]),
        ("adversarial", 0, "fake", ["head", "score"]),
        ("adversarial", 1, "fake", ["head", "score"]),
    ]


def test_each_update_moves_its_owner_alone_and_the_teacher_never_moves(tmp_path: Path) -> None:
    teacher = teacher_model()
    trained = train(tmp_path, teacher)
    states = [*trained.seen.before, snapshot(trained.method)]
    for (name, _, update), before, after in zip(trained.seen.updates, states, states[1:], strict=False):
        moved = {part for part in before if not torch.equal(before[part], after[part])}
        with_head = {"head"} if name == "adversarial" else set()
        assert moved == ({"generator"} if update.owner == "generator" else {"fake"} | with_head)


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_gan_gradient_reaches_the_generator_through_networks_that_it_leaves_alone(
    tmp_path: Path, features: str
) -> None:
    trained = train(tmp_path, teacher_model(), features=features, adversarial={**STAGES["adversarial"], "steps": 0})
    method = trained.method
    stream = trained.ctx.stream("train", 4, view=method._view)
    trained.ctx.randomness.phase = "test"
    update = next(method._step({"real": stream[0]}, 0, gan=True))
    generator = list(method._generator.parameters())
    gradients = torch.autograd.grad(update.losses["gan"], generator, allow_unused=True)
    assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0
    others = [*method._real.parameters(), *method._fake.parameters(), *method._head.parameters()]
    assert all(parameter.grad is None for parameter in others)
    assert all(not parameter.requires_grad for parameter in method._real.parameters())


def test_matching_loss_reaches_neither_teacher_nor_fake_score(tmp_path: Path) -> None:
    trained = train(tmp_path, teacher_model())
    method, update = trained.method, trained.seen.updates[0][2]
    assert update.losses["matching"].requires_grad
    trained.ctx.randomness.phase = "test"
    loss = next(method._step({}, 0, gan=False)).losses["matching"]
    fake = torch.autograd.grad(loss, list(method._fake.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in fake)


def test_only_the_last_call_of_the_generator_carries_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = train(tmp_path, teacher_model(), num_steps=4)
    method, calls = trained.method, []
    trained.ctx.randomness.phase = "test"
    predict = Denoiser.predict

    def spy(self: Denoiser, noised: Tensor, level: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        if self is method._generator:
            calls.append((float(level[0]), torch.is_grad_enabled(), noised.requires_grad))
        return predict(self, noised, level, condition)

    monkeypatch.setattr(Denoiser, "predict", spy)
    stops = set()
    for i in range(0, 40, 2):
        calls.clear()
        next(method._step({}, i, gan=False))
        assert [level for level, *_ in calls] == [1.0, 0.75, 0.5, 0.25][: len(calls)]
        assert [grad for _, grad, _ in calls] == [False] * (len(calls) - 1) + [True]
        assert not any(tracked for *_, tracked in calls)
        stops.add(len(calls))
    assert stops == {1, 2, 3, 4}
    calls.clear()
    next(method._step({}, 1, gan=False))
    assert not any(grad for _, grad, _ in calls)


def test_processes_stop_the_simulation_at_the_same_call_on_different_noise(tmp_path: Path) -> None:
    trained = train(tmp_path, teacher_model(), num_steps=4)
    method, context = trained.method, trained.ctx
    stops, noises = [], []
    for rank in (0, 1):
        context.randomness = Randomness(0, rank, 2)
        context.randomness.phase = "test"
        stops.append([torch.randint(4, (), generator=context.rng(i, "stop", shared=True)).item() for i in range(8)])
        noises.append(method._noise(0, "call-0"))
    assert stops[0] == stops[1]
    assert not torch.equal(*noises)


def test_teacher_alone_is_guided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scales: dict[str, set[float]] = {}
    clean = Denoiser.clean

    def spy(self: Denoiser, *arguments: Any) -> Tensor:
        scales.setdefault(str(id(self)), set()).add(arguments[4] if len(arguments) > 3 and arguments[3] else 1.0)
        return clean(self, *arguments)

    monkeypatch.setattr(Denoiser, "clean", spy)
    method = train(tmp_path, teacher_model(), guidance=3.0).method
    assert scales[str(id(method._real))] == {3.0}
    assert scales[str(id(method._fake))] == scales[str(id(method._generator))] == {1.0}


# --- every kind of teacher -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        (QWEN, {}),
        ("FluxTransformer2DModel", {}),
        ("SD3Transformer2DModel", {"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}}),
        ("DiTTransformer2DModel", {}),
        ("DiTTransformer2DModel", {"scheduler": {"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"}}),
        ("DiTTransformer2DModel", {"scheduler": {"_class_name": "DDPMScheduler", "prediction_type": "sample"}}),
        ("PixArtTransformer2DModel", {}),
        ("text", {}),
        ("text", {"scheduler": {"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"}}),
        ("sdxl", {"scheduler": {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear"}}),
        ("labels", {"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}}),
    ],
)
def test_every_class_and_prediction_type_is_distilled_and_sampled_as_it_was_trained(
    tmp_path: Path, name: str, extra: dict[str, Any]
) -> None:
    trained = train(tmp_path, teacher_model(name, **extra), guidance=2.0)
    method = trained.method
    assert all(torch.isfinite(loss) for *_, update in trained.seen.updates for loss in update.losses.values())
    deployable = method.deployables(trained.ctx)["student"]
    assert deployable.driver.settings["rule"] == "renoise"
    assert deployable.driver.settings["guidance_scale"] == 1.0

    noise = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    driver = torch_driver(deployable)
    driver.settings["clip"] = None  # type: ignore[attr-defined]
    image = driver({"label": np.array([3, 7]), "noise": noise}, seed=5)["image"]
    between = torch.from_numpy(np.random.default_rng(5).standard_normal((2, 1, 8, 8)))  # the driver's second noise
    expected = rolled_out(method, torch.from_numpy(noise), between, torch.tensor([3, 7]))
    np.testing.assert_allclose(image, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@torch.no_grad()
def rolled_out(method: DMD2, first: Tensor, second: Tensor, rows: Tensor) -> Tensor:
    """Two steps of the generator, by the training's own parts."""
    generator, condition = method._generator, method._table(rows)
    early, late = (level.expand(2) for level in method._levels)
    clean = generator.clean(first, early, condition)
    noised = generator.schedule.add_noise(clean, second.float(), late)
    return generator.clean(noised, late, condition)


def test_unconditional_unet_is_distilled_without_guidance(tmp_path: Path) -> None:
    trained = train(tmp_path, teacher_model("unconditional"))
    driver = torch_driver(trained.method.deployables(trained.ctx)["student"])
    assert driver({"label": np.array([0, 0, 3])})["image"].shape == (3, 1, 8, 8)


# --- the warm start --------------------------------------------------------------------------------------------------

WARM: dict[str, Any] = {
    "num_steps": 1,
    "warm_start": {"steps": 30, "lr": 2e-3, "pairs": 8, "ode_steps": 3},
    "match": {**STAGES["match"], "steps": 0},
    "adversarial": {**STAGES["adversarial"], "steps": 0},
}


def test_warm_start_brings_one_step_to_where_the_teachers_ode_leads(tmp_path: Path) -> None:
    trained = train(tmp_path, teacher_model(), batch=8, **WARM)
    updates = [update for name, _, update in trained.seen.updates if name == "warm_start"]
    assert {update.owner for update in updates} == {"generator"}
    losses = [float(update.losses["pairs"].detach()) for update in updates]
    assert len(losses) == 30 and losses[-1] < 0.5 * losses[0]
    assert all(set(before) == {"real", "generator", "fake", "head"} for before in trained.seen.before)


def test_pairs_are_the_noises_and_ends_of_the_guided_ode(tmp_path: Path) -> None:
    trained = train(tmp_path, teacher_model(), guidance=2.0, **WARM)
    method, task = trained.method, ImageGeneration({"train": "digits"}, {"num_inference_steps": 3, "guidance_scale": 2})
    trained.ctx.randomness.phase = "test"
    pairs = method._ode_pairs()
    assert {name: len(values) for name, values in pairs.items()} == {"noise": 8, "row": 8, "sample": 8}
    driver = torch_driver(task.deployable(method._real.model))
    driver.settings["clip"] = None  # type: ignore[attr-defined]
    expected = driver({"label": pairs["row"].numpy(), "noise": pairs["noise"].numpy()})["image"]
    np.testing.assert_allclose(pairs["sample"].numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_one_step_generator_is_called_at_the_timestep_that_is_set(tmp_path: Path) -> None:
    trained = train(tmp_path, teacher_model("text"), num_steps=1, conditioning_timestep=399)
    deployable = trained.method.deployables(trained.ctx)["student"]
    assert deployable.assets["timesteps"].tolist() == [399]


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ema"), [(QWEN, None), ("text", 0.5)])
def test_adapters_alone_are_trained_and_merged_into_plain_weights(tmp_path: Path, name: str, ema: float | None) -> None:
    teacher = teacher_model(name)
    before = weights(teacher)
    trained = train(tmp_path / "run", teacher, lora_rank=2, ema=ema)
    generator, student = trained.method._generator.module, trained.method.student()
    assert {path.rpartition(".")[2] for path, p in generator.named_parameters() if p.requires_grad} == {"up", "down"}
    after = weights(student)
    assert set(after) == set(before) and student.info.edits == ()
    changed = {path for path in after if not torch.equal(after[path], before[path])}
    assert changed and all(after[path].dim() > 1 for path in changed)
    deltas = [after[path].flatten(1) - before[path].flatten(1) for path in changed]
    assert all(torch.linalg.matrix_rank(delta, rtol=1e-3) <= 2 for delta in deltas)
    save_model(student, tmp_path / "student")
    assert all(torch.equal(value, after[key]) for key, value in weights(load_model(tmp_path / "student")).items())


def test_training_of_adapters_goes_on_to_the_same_bits_after_a_kill(tmp_path: Path) -> None:
    make: Callable[..., Watching] = lambda directory, **more: train(  # noqa: E731
        tmp_path / directory, teacher_model(), lora_rank=2, **more
    )
    whole = make("whole").method.student()
    with pytest.raises(Killed):
        make("killed", kill=("match", 2))
    resumed = weights(make("killed").method.student())
    assert all(torch.equal(value, resumed[name]) for name, value in weights(whole).items())


# --- what is left behind ---------------------------------------------------------------------------------------------


def test_training_goes_on_to_the_same_bits_after_a_kill(tmp_path: Path) -> None:
    make: Callable[..., Watching] = lambda directory, **more: train(  # noqa: E731
        tmp_path / directory, teacher_model(), ema=0.5, **more
    )
    whole = make("whole").method.student()
    for kill in (("match", 2), ("adversarial", 1)):
        with pytest.raises(Killed):
            make("killed", kill=kill)
    resumed = make("killed").method
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed.student())[name]), name


def test_student_is_the_average_when_one_is_kept(tmp_path: Path) -> None:
    method = train(tmp_path, teacher_model(), ema=0.5).method
    student, last = weights(method.student()), method._generator.module.state_dict()
    assert any(not torch.equal(student[name], last[name]) for name in student)


def test_steps_of_the_student_survive_saving(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", teacher_model())
    save_model(trained.method.student(), tmp_path / "student")
    loaded = load_model(tmp_path / "student")
    assert loaded.info.extra["student_timesteps"] == [999, 499]
    deployable = trained.ctx.task.deployable(loaded)
    assert deployable.assets["levels"].tolist() == [1.0, 0.5, 0.0]


def test_pruned_student_of_a_chain_is_distilled_against_the_original(tmp_path: Path) -> None:
    teacher = teacher_model(layers=4)
    before = copy.deepcopy(weights(teacher))
    stages = {"depth": PPCLStage(steps=1, lr=1e-3, batch=8), "finetune": PPCLStage(steps=0, lr=1e-3)}
    pruning = PPCL(PPCLConfig(calibration=64, intervals=[(1, 2)], keep=0.75, ffn=[3], **stages))
    run_method(tmp_path / "ppcl", pruning, ImageGeneration({"train": "digits"}, {}), teachers=[teacher])

    method = train(tmp_path / "dmd2", teacher, chained=pruning.student()).method

    blocks = [len(net.stack.blocks) for net in (method._real, method._fake, method._generator)]
    assert blocks == [4, 4, 3]
    assert method.student().info.edits == pruning.student().info.edits != ()
    assert all(torch.equal(before[name], value) for name, value in weights(teacher).items())


def test_exported_student_draws_what_torch_draws(tmp_path: Path) -> None:
    from compressor.exporters.export import export
    from compressor.profiles.target import load_target

    pytest.importorskip("onnxruntime")
    trained = train(tmp_path / "run", teacher_model())
    deployable = trained.method.deployables(trained.ctx)["student"]
    export(deployable, load_target("ort-fp32"), tmp_path / "artifact")
    engine = LoadedEngine(tmp_path / "artifact")
    request = {"label": np.array([1, 4, 9])}
    np.testing.assert_allclose(
        engine.driver(request, seed=2)["image"], torch_driver(deployable)(request, seed=2)["image"], atol=1e-3
    )
    engine.close()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"noise_range": (0.5, 0.5)}, "noise_range must rise within 0 and 1, got 0.5 to 0.5"),
        ({"conditioning_timestep": 399}, "conditioning_timestep is for one-step generators"),
        ({"num_steps": 1, "conditioning_timestep": 1000}, "conditioning_timestep must be below 1000, not 1000"),
        ({"warm_start": {"steps": 1}}, "warm_start is for one-step generators"),
        ({"lora_rank": 4096}, "no weight of the generator is larger than such an adapter"),
        ({"num_steps": 2000}, "num_inference_steps must be in 1..1000"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        train(tmp_path, teacher_model(), **config)
