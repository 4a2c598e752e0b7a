"""PPCL: its mathematics beyond the golden numbers, where gradients flow, and its layouts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.errors import RequestError
from compressor.methods.generation.ppcl import (
    PPCL,
    PPCLConfig,
    Stage,
    align,
    chain_cka,
    choose_text_runs,
    find_redundant_intervals,
    fit_linear_probe,
    linear_cka,
    normalized_alignment_loss,
)
from compressor.models.anatomy.blocks import State, block_stack
from compressor.models.linear_fit import LeastSquares
from compressor.models.model import Model
from compressor.tasks.image_generation import ImageGeneration
from tests.method_runs import Trained, run_method
from tests.tiny_transformers import tiny


def test_probe_recovers_an_affine_map() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 20, 6), torch.randn(6, 6), torch.randn(6)
    fitted, offset = fit_linear_probe(x, x + x @ weight.T + bias)
    assert torch.allclose(fitted, weight, atol=1e-5)
    assert torch.allclose(offset, bias, atol=1e-5)


def test_probe_is_the_minimum_norm_solution_when_the_inputs_are_rank_deficient() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 2) @ torch.randn(2, 6)
    y = x + torch.randn(50, 6)
    weight, bias = fit_linear_probe(x, y)
    design = torch.cat([x, torch.ones(50, 1)], 1).double()
    expected = torch.linalg.pinv(design) @ (y - x).double()
    assert torch.allclose(weight.T.double(), expected[:-1], atol=1e-5)
    assert torch.allclose(bias.double(), expected[-1], atol=1e-5)


def test_fit_over_batches_equals_the_fit_of_all_rows() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(300, 8), torch.randn(300, 8)
    sums = LeastSquares()
    for part in range(3):
        sums.add(x[part * 100 : part * 100 + 100], y[part * 100 : part * 100 + 100])
    for one, other in zip(sums.solve(), fit_linear_probe(x, y), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_cka_ignores_rotation_and_scale_and_sees_independence() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 5)
    rotation = torch.linalg.qr(torch.randn(5, 5)).Q
    assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, torch.randn(4000, 5)) < 0.01
    assert linear_cka(x, torch.ones(4000, 3)) == 0


def test_chain_starts_at_one_and_is_compared_with_the_reference_asked_for() -> None:
    torch.manual_seed(0)
    states = [torch.randn(10, 4, 6) for _ in range(3)]
    nothing = [(torch.zeros(6, 6), torch.zeros(6))] * 3
    still = chain_cka(states, nothing, reference="start")
    assert torch.allclose(still.triu(), torch.ones(3, 3).triu())
    moving = chain_cka(states, nothing, reference="block")
    assert moving[0, 1] == linear_cka(states[0], states[1])
    assert torch.equal(moving.diagonal(), torch.ones(3))


def test_run_ends_where_the_fall_accelerates() -> None:
    cka = torch.eye(6)
    cka[0, 1:] = torch.tensor([0.90, 0.85, 0.70, 0.60, 0.55])  # drops .10 .05 .15: cut before block 3
    cka[3, 4:] = torch.tensor([0.90, 0.88])  # the drop only shrinks: to the end
    assert find_redundant_intervals(cka).tolist() == [[0, 2], [3, 5]]
    assert find_redundant_intervals(cka, start=3).tolist() == [[3, 5]]
    assert find_redundant_intervals(cka, end=2).tolist() == [[0, 2]]


def test_equal_drops_do_not_end_a_run() -> None:
    cka = torch.eye(4)
    cka[0, 1:] = torch.tensor([0.75, 0.5, 0.25])
    assert find_redundant_intervals(cka).tolist() == [[0, 3]]


def test_dissimilar_run_is_left_alone_and_the_search_goes_on_behind_its_first_block() -> None:
    cka = torch.eye(4)
    cka[0, 1:] = torch.tensor([0.3, 0.2, 0.1])
    cka[1, 2:] = torch.tensor([0.95, 0.93])
    assert find_redundant_intervals(cka, min_similarity=0.9).tolist() == [[1, 3]]
    assert find_redundant_intervals(torch.eye(3), min_similarity=0.9).tolist() == []


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**31), st.floats(0, 1))
def test_runs_are_disjoint_ascending_and_of_two_blocks_at_least(count: int, seed: int, least: float) -> None:
    cka = torch.rand(count, count, generator=torch.Generator().manual_seed(seed)).triu(1) + torch.eye(count)
    for floor in (None, least):
        runs = find_redundant_intervals(cka, 1, count - 1, floor).tolist()
        covered = 0
        for u, v in runs:
            assert covered < u < v < count
            assert floor is None or cka[u, v] >= floor
            covered = v


def test_alignment_sees_directions_only_and_gives_the_teacher_no_gradient() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    loss = normalized_alignment_loss(student, teacher)
    cosine = torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    assert loss.item() == pytest.approx((2 - 2 * cosine).mean().item(), rel=1e-5)
    assert normalized_alignment_loss(5 * student, teacher).item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad.abs().sum() > 0


def test_alignment_leaves_padded_text_out() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[True, True], [True, False]])
    image, text = torch.randn(2, 4, 8), torch.randn(2, 2, 8)
    teacher = State(image, torch.randn(2, 2, 8), {"encoder_hidden_states_mask": mask}, (4, 4))
    changed = text.clone()
    changed[1, 1] += 10
    assert align(State(image, text, {}, (4, 4)), teacher) == align(State(image, changed, {}, (4, 4)), teacher)


def test_text_runs_are_the_longest_that_resemble_their_anchor() -> None:
    similarity = torch.tensor(
        [[1.0, 0.99, 0.5, 0.1], [0.99, 1, 0.97, 0.96], [0.5, 0.97, 1, 0.99], [0.1, 0.96, 0.99, 1]]
    )
    assert choose_text_runs(similarity, [True] * 4, 0.95) == [(1, 3)]
    assert choose_text_runs(similarity, [True, True, True, False], 0.95) == [(0, 1)]
    assert choose_text_runs(similarity, [True] * 4, 0.999) == []


# --- on a real network -----------------------------------------------------------------------------------------------


def teacher_model(layers: int = 6) -> Model:
    return tiny("QwenImageTransformer2DModel", layers=layers).model()


def train(directory: Path, teacher: Model, **config: Any) -> Trained:
    stages = {"depth": Stage(steps=3, lr=1e-3, batch=8), "finetune": Stage(steps=0, lr=1e-3)}
    method = PPCL(PPCLConfig(**{"calibration": 64, **stages, **config}))
    return run_method(directory, method, ImageGeneration({"train": "digits"}, {}), teachers=[teacher])


def weights(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def test_plugs_are_trained_alone_and_the_teacher_stays_as_it_is(tmp_path: Path) -> None:
    teacher = teacher_model()
    before = weights(teacher)
    both = train(tmp_path / "both", teacher, intervals=[(1, 2), (3, 4)], keep=1.0).method
    alone = train(tmp_path / "alone", teacher, intervals=[(3, 4)], keep=1.0).method
    after = weights(teacher)
    assert all(torch.equal(before[name], after[name]) for name in before)
    start = block_stack(teacher.module).blocks[3].state_dict()
    for name, value in alone._plugs["3-4"].state_dict().items():
        assert torch.allclose(value, both._plugs["3-4"].state_dict()[name], atol=1e-7), name
    moved = [not torch.equal(start[name], value) for name, value in alone._plugs["3-4"].state_dict().items()]
    assert all(moved)


def test_every_stage_runs_and_the_budget_is_met(tmp_path: Path) -> None:
    teacher = teacher_model()
    trained = train(
        tmp_path,
        teacher,
        keep=0.5,
        ffn="auto",
        text_similarity=0.5,
        width=Stage(steps=2, lr=1e-3, batch=8),
        finetune=Stage(steps=2, lr=1e-3, batch=8),
    )
    size = [
        sum(p.numel() for b in block_stack(m.module).blocks for p in b.parameters())
        for m in (trained.method.student(), teacher)
    ]
    assert size[0] <= 0.5 * size[1]
    assert not trained.method.notes
    phases = sorted(path.name.partition("-")[2] for path in tmp_path.glob("*-*"))
    assert phases == sorted(["probes", "cka", "depth", "survey", "maps", "width", "finetune"])
    assert set(trained.history["finetune"]) == {"teacher", "data"}


def test_student_of_depth_alone_is_a_plain_shorter_model(tmp_path: Path) -> None:
    student = train(tmp_path, teacher_model(), intervals=[(1, 2), (3, 4)], keep=0.7).method.student()
    assert student.info.edits == ()
    assert student.info.config["num_layers"] == len(block_stack(student.module).blocks) == 4


def test_unreachable_budget_is_said_and_the_smallest_layout_made(tmp_path: Path) -> None:
    method = train(tmp_path, teacher_model(), intervals=[(1, 2)], keep=0.1).method
    assert "keep=0.1 cannot be met: the smallest layout keeps 0.83" in method.notes[0]
    assert len(block_stack(method.student().module).blocks) == 5


def test_all_plugs_off_is_the_teacher(tmp_path: Path) -> None:
    teacher = teacher_model()
    method = train(tmp_path, teacher, intervals=[(1, 2)], active=[]).method
    assert all(torch.equal(weights(teacher)[name], value) for name, value in weights(method.student()).items())


def test_sharing_no_storage_with_the_teacher_when_the_student_trains(tmp_path: Path) -> None:
    teacher = teacher_model()
    before = copy.deepcopy(weights(teacher))
    train(tmp_path, teacher, intervals=[(1, 2)], keep=0.9, finetune=Stage(steps=3, lr=1e-2, batch=8))
    assert all(torch.equal(before[name], value) for name, value in weights(teacher).items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"intervals": [(0, 2)]}, r"intervals: \[0, 2\] must have two or more blocks between 1 and 4"),
        ({"intervals": [(2, 3), (3, 4)]}, r"intervals: \[3, 4\]"),
        ({"intervals": [(1, 2)], "active": [3]}, "active: no run starts at block 3; runs start at 1"),
        ({"intervals": [(1, 2)], "ffn": [2]}, "ffn: block 2 is not kept"),
        ({"intervals": [(1, 2)], "text": [(3, 3)]}, r"text: \[3, 3\] must span at least two blocks"),
    ],
)
def test_wrong_choice_is_refused_in_one_line(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        train(tmp_path, teacher_model(), keep=0.2, **config)
