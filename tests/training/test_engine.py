"""The rules of an update: who receives gradients, in which order things happen, what is skipped, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_methods import Killed, network, same_bits, samples

from compressor.data.stream import Batch, Stream
from compressor.errors import DivergedError, RequestError
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.phase import Compute, Optim, Phases, Train, Update
from compressor.training.random import Randomness
from compressor.training.update import backward_by_stashing, backward_to

Step = Callable[[dict[str, Batch], int], Iterator[Update]]


def run(directory: Path, *phases: Train | Compute, **options: Any) -> Engine:
    def generate() -> Phases:
        for phase in phases:  # noqa: UP028 (a tuple cannot be sent the answers)
            yield phase

    engine = Engine(directory, distributed=Distributed.single(), randomness=Randomness(0), fingerprint="", **options)
    engine.run(generate())
    return engine


def train(step: Step, optimizers: dict[str, Optim], steps: int = 1, name: str = "train", **options: Any) -> Train:
    return Train(name, steps, optimizers, {"train": Stream(samples(), 4)}, step, options.pop("state", {}), **options)


def loss_of(module: nn.Module, batch: dict[str, Batch]) -> Tensor:
    return module(batch["train"]["x"]).square().mean()


# --- owners --------------------------------------------------------------------------------------------------------


def test_gradient_reaches_the_owner_alone_when_the_loss_passes_through_another_network(tmp_path: Path) -> None:
    generator, critic = network(), network()
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    marker = torch.full((8,), 5.0)
    critic[0].bias.grad = marker

    def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        yield Update("generator", {"gan": critic(generator(batch["train"]["x"])).mean()})
        assert critic[0].bias.grad is marker and critic[0].weight.grad is None

    optimizers = {"generator": Optim(generator.parameters())}
    run(tmp_path, train(step, optimizers))
    assert same_bits(before, critic.state_dict())


def test_critic_trains_on_its_own_gradient_only_when_the_generator_went_before(tmp_path: Path) -> None:
    generator, critic, alone = network(), network(), network()
    alone.load_state_dict(critic.state_dict())

    def both(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        fake = generator(batch["train"]["x"])
        yield Update("generator", {"gan": critic(fake).mean()})
        yield Update("critic", {"own": critic(batch["train"]["x"]).square().mean()})

    optimizers = {"generator": Optim(generator.parameters()), "critic": Optim(critic.parameters())}
    run(tmp_path / "both", train(both, optimizers))

    def single(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        yield Update("critic", {"own": alone(batch["train"]["x"]).square().mean()})

    run(tmp_path / "alone", train(single, {"critic": Optim(alone.parameters())}))
    assert same_bits(critic.state_dict(), alone.state_dict())


def test_two_owners_of_one_update_step_as_two_separate_updates_would(tmp_path: Path) -> None:
    def result(directory: Path, together: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        left, right = network(), network()

        def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
            losses = {"left": loss_of(left, batch), "right": loss_of(right, batch)}
            if together:
                yield Update(("left", "right"), losses)
            else:
                yield Update("left", {"left": losses["left"]})
                yield Update("right", {"right": losses["right"]})

        optimizers = {"left": Optim(left.parameters()), "right": Optim(right.parameters(), kind="sgd", lr=0.1)}
        run(directory, train(step, optimizers, steps=3))
        return left.state_dict() | {f"right.{name}": value for name, value in right.state_dict().items()}

    assert same_bits(result(tmp_path / "one", True), result(tmp_path / "two", False))


@pytest.mark.parametrize("backward", [backward_to, backward_by_stashing])
def test_both_forms_of_the_owner_rule_give_the_same_gradients(backward: Callable[..., None]) -> None:
    torch.manual_seed(0)
    owner, other, unreached = network(), network(), nn.Parameter(torch.ones(2))
    loss = other(owner(torch.randn(3, 4))).square().mean()
    expected = torch.autograd.grad(loss, list(owner.parameters()), retain_graph=True)
    other[0].bias.grad = torch.ones(8)
    backward(loss, [*owner.parameters(), unreached])
    assert all(torch.equal(p.grad, g) for p, g in zip(owner.parameters(), expected, strict=True))
    assert torch.equal(other[0].bias.grad, torch.ones(8))
    assert other[0].weight.grad is None and unreached.grad is None


def test_double_backward_through_a_gradient_penalty_works(tmp_path: Path) -> None:
    critic = network()

    def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        x = batch["train"]["x"].requires_grad_()
        (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        yield Update("critic", {"penalty": slope.square().mean()})

    before = critic[0].weight.detach().clone()
    run(tmp_path, train(step, {"critic": Optim(critic.parameters())}))
    assert not torch.equal(before, critic[0].weight)


# --- order, hold, rates ----------------------------------------------------------------------------------------------


def test_step_goes_on_after_its_owners_have_stepped(tmp_path: Path) -> None:
    module = network()
    seen = []

    def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        seen.append(module[0].weight.detach().clone())
        stepped = yield Update("module", {"loss": loss_of(module, batch)})
        seen.append(module[0].weight.detach().clone())
        assert stepped is True

    run(tmp_path, train(step, {"module": Optim(module.parameters(), kind="sgd")}))
    assert not torch.equal(*seen)


def test_backward_through_weights_that_have_stepped_since_is_refused(tmp_path: Path) -> None:
    module = network()

    def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        late = module(module(batch["train"]["x"])).mean()
        yield Update("module", {"loss": loss_of(module, batch)})
        yield Update("module", {"late": late})

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(tmp_path, train(step, {"module": Optim(module.parameters(), lr=0.1)}))


def test_held_updates_give_the_step_of_their_sum(tmp_path: Path) -> None:
    def result(directory: Path, hold: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = network().double()
        answers = []

        def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
            parts = batch["train"]["x"].double().chunk(2)
            losses = {str(k): module(part).square().mean() for k, part in enumerate(parts)}
            if hold:
                answers.append((yield Update("module", {"0": losses["0"]}, hold=True)))
                answers.append((yield Update("module", {"1": losses["1"]})))
            else:
                yield Update("module", losses)

        run(directory, train(step, {"module": Optim(module.parameters(), kind="sgd", lr=0.1)}, steps=3))
        assert answers == ([False, True] * 3 if hold else [])
        return module.state_dict()

    held, summed = result(tmp_path / "held", True), result(tmp_path / "summed", False)
    for name, value in held.items():
        torch.testing.assert_close(value, summed[name], rtol=0, atol=1e-14)


def test_learning_rate_follows_its_schedule_in_every_group(tmp_path: Path) -> None:
    weight, bias = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    seen = []

    def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        yield Update("both", {"loss": (weight + bias).sum()})
        seen.append((-weight.item(), -bias.item()))

    groups = [{"params": [weight]}, {"params": [bias], "lr": 0.5}]
    optim = Optim(groups, kind="sgd", lr=1.0, schedule=lambda i: [1.0, 0.5][i])
    run(tmp_path, train(step, {"both": optim}, steps=2))
    assert seen == [(1.0, 0.5), (1.5, 0.75)]


def test_gradient_is_clipped_to_its_norm_and_value(tmp_path: Path) -> None:
    module = nn.Parameter(torch.zeros(2))

    def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        yield Update("module", {"loss": (module * torch.tensor([30.0, 40.0])).sum()})

    run(tmp_path / "norm", train(step, {"module": Optim([module], kind="sgd", lr=1.0, clip_norm=1.0)}))
    torch.testing.assert_close(module.detach(), torch.tensor([-0.6, -0.8]))
    module.data.zero_()
    run(tmp_path / "value", train(step, {"module": Optim([module], kind="sgd", lr=1.0, clip_value=2.0)}))
    torch.testing.assert_close(module.detach(), torch.tensor([-2.0, -2.0]))


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_masked_entries_keep_their_bits_even_under_weight_decay(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(0)
    pixels, twin = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.zeros(5, 3))
    twin.data.copy_(pixels.data)
    start, rows = pixels.detach().clone(), torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])[:, None]
    called = []

    def optim(parameter: nn.Parameter, **options: Any) -> Optim:
        return Optim([parameter], kind=kind, lr=0.1, options={"weight_decay": 0.1}, **options)

    def step_of(parameter: nn.Parameter) -> Step:
        def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
            yield Update("pixels", {"loss": parameter.square().sum()})

        return step

    masked = optim(pixels, update_mask=lambda: {pixels: rows}, after_step=[lambda: called.append(1)])
    run(tmp_path / "masked", train(step_of(pixels), {"pixels": masked}, steps=3))
    run(tmp_path / "free", train(step_of(twin), {"pixels": optim(twin)}, steps=3))
    free = rows.bool().expand(5, 3)
    assert torch.equal(pixels[~free], start[~free])
    assert torch.equal(pixels[free], twin[free])
    assert called == [1, 1, 1]


# --- guard -----------------------------------------------------------------------------------------------------------


def test_update_is_skipped_when_a_loss_is_not_finite(tmp_path: Path) -> None:
    module = network()
    answers, events = [], []

    def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        before = module[0].weight.detach().clone()
        factor = math.nan if i % 2 else 1.0
        answers.append(
            (yield Update("module", {"fine": loss_of(module, batch), "odd": factor * loss_of(module, batch)}))
        )
        assert torch.equal(before, module[0].weight) == bool(i % 2)
        assert module[0].weight.grad is None

    engine = run(tmp_path, train(step, {"module": Optim(module.parameters())}, steps=40), log=events.append)
    assert answers == [True, False] * 20  # many skips, but never ten in a row
    skipped = [event for event in events if event["event"] == "skipped"]
    assert len(skipped) == 20 and skipped[0]["cause"] == "loss 'odd'" and skipped[0]["step"] == 1
    assert len(engine.history["train"]["odd"]) == 20


def test_update_is_skipped_when_only_the_gradient_is_not_finite(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    answers = []

    def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        answers.append((yield Update("module", {"loss": parameter.sqrt().sum()})))  # 0, but its slope is infinite

    run(tmp_path, train(step, {"module": Optim([parameter])}))
    assert answers == [False] and parameter.item() == 0


def test_run_diverges_after_ten_skips_in_a_row_even_if_another_owner_is_well(tmp_path: Path) -> None:
    sick, well = network(), network()
    started = []

    def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        started.append(i)
        yield Update("sick", {"fine": loss_of(sick, batch), "broken": math.inf * loss_of(sick, batch)})
        yield Update("well", {"loss": loss_of(well, batch)})

    optimizers = {"sick": Optim(sick.parameters()), "well": Optim(well.parameters())}
    expected = r"phase 'train' diverged at step 9: loss 'broken' .* lower its learning rate \(now 0.001\)"
    with pytest.raises(DivergedError, match=expected):
        run(tmp_path, train(step, optimizers, steps=20))
    assert len(started) == 10


def test_skips_are_counted_on_when_the_run_was_killed_between_them(tmp_path: Path) -> None:
    module = network()

    def step_until(last: int) -> Step:
        def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
            if i == last:
                raise Killed
            yield Update("module", {"loss": math.nan * loss_of(module, batch)})

        return step

    def phase(last: int) -> Train:
        return train(step_until(last), {"module": Optim(list(module.parameters()))}, steps=30)

    with pytest.raises(Killed):
        run(tmp_path, phase(6), checkpoint_steps=1)
    with pytest.raises(DivergedError, match="at step 9"):
        run(tmp_path, phase(30), checkpoint_steps=1)


def test_held_gradients_are_dropped_when_one_of_their_losses_was_not_finite(tmp_path: Path) -> None:
    module, events = network(), []

    def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        yield Update("module", {"bad": math.nan * loss_of(module, batch)}, hold=True)
        assert not (yield Update("module", {"good": loss_of(module, batch)}))
        assert (yield Update("module", {"good": loss_of(module, batch)}))

    run(tmp_path, train(step, {"module": Optim(module.parameters())}), log=events.append)
    assert [event["cause"] for event in events if event["event"] == "skipped"] == ["loss 'bad'"]


def test_clean_optimizer_cleans_entries_instead_of_skipping(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(3))

    def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        assert (yield Update("module", {"loss": (parameter * torch.tensor([1.0, math.nan, math.inf])).sum()}))

    run(tmp_path, train(step, {"module": Optim([parameter], kind="sgd", lr=1.0, clean=True)}))
    assert parameter.tolist() == [-1.0, 0.0, -1e5]


# --- phases ----------------------------------------------------------------------------------------------------------


def one_step(module: nn.Module) -> Step:
    def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        yield Update("module", {"loss": loss_of(module, batch)})

    return step


@pytest.mark.parametrize("threads", [0, 2])
def test_failure_to_make_a_batch_stops_the_run(tmp_path: Path, threads: int) -> None:
    module = network()

    class Broken:
        def __getitem__(self, i: int) -> Batch:
            raise ValueError("no such picture")

    phase = train(one_step(module), {"module": Optim(module.parameters())})
    phase.streams = {"train": Broken()}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="no such picture"):
        run(tmp_path, phase, loader_threads=threads)


def test_empty_result_of_a_compute_phase_is_allowed_and_none_is_refused(tmp_path: Path) -> None:
    run(tmp_path, Compute("nothing", dict))
    refused(tmp_path, "must return named arrays, not NoneType", Compute("none", lambda: None))  # type: ignore[arg-type,return-value]


def test_phase_of_no_steps_is_skipped(tmp_path: Path) -> None:
    module = network()
    before = module[0].weight.detach().clone()
    run(tmp_path, train(one_step(module), {"module": Optim(module.parameters())}, steps=0))
    assert torch.equal(before, module[0].weight)


def test_carried_optimizer_goes_on_as_if_the_phases_were_one(tmp_path: Path) -> None:
    def result(directory: Path, lengths: Sequence[int], carry: tuple[str, ...]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = network()
        x = torch.randn(5, 4)

        def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
            yield Update("module", {"loss": module(x).square().mean()})

        phases = [
            train(step, {"module": Optim(module.parameters(), lr=0.01)}, n, str(k), carry=carry if k else ())
            for k, n in enumerate(lengths)
        ]
        run(directory, *phases)
        return module.state_dict()

    whole = result(tmp_path / "whole", [5], ())
    assert same_bits(whole, result(tmp_path / "carried", [2, 3], ("module",)))
    assert not same_bits(whole, result(tmp_path / "fresh", [2, 3], ()))


def test_modes_are_applied_at_the_start_and_again_after_validation(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    seen = []

    def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        seen.append((module.training, module[1].training))
        yield Update("module", {"loss": loss_of(module, batch)})

    def validate() -> float:
        module.eval()
        return 0.0

    modes = [(module, "train"), (module[1], "eval")]
    phase = train(step, {"module": Optim(module.parameters())}, 3, modes=modes, validate=validate, validate_every=1)
    engine = run(tmp_path, phase)
    assert seen == [(True, False)] * 3
    assert module.training and not module[1].training
    assert engine.history["train"]["validation"] == [(1, 0.0), (2, 0.0), (3, 0.0)]


def test_keep_is_offered_every_score_and_puts_back_what_it_kept(tmp_path: Path) -> None:
    module = network()
    offers = []

    class Keep:
        def offer(self, score: float, step: int) -> None:
            offers.append((score, step))

        def finish(self) -> None:
            with torch.no_grad():
                module[0].bias.fill_(7)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def phase() -> Train:
        optimizers = {"module": Optim(module.parameters())}
        return train(
            one_step(module),
            optimizers,
            5,
            validate=lambda: 1.5,
            validate_every=2,
            keep=Keep(),
            state={"module": module},
        )

    run(tmp_path, phase())
    assert offers == [(1.5, 2), (1.5, 4), (1.5, 5)]
    module[0].bias.data.zero_()
    run(tmp_path, phase())
    assert module[0].bias.tolist() == [7.0] * 8


def test_history_is_thinned_to_means_that_miss_no_loss(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(1))

    def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        yield Update("module", {"always": 0 * parameter.sum() + i})
        if i % 5 == 0:
            yield Update("module", {"seldom": 0 * parameter.sum() + 1.0})

    phase = train(step, {"module": Optim([parameter], kind="sgd")}, 1003)
    history = run(tmp_path, phase, checkpoint_seconds=1e9).history["train"]
    assert len(history["always"]) == 335
    assert history["always"][:2] == [(3, 1.0), (6, 4.0)] and history["always"][-1] == (1003, 1002.0)
    assert len(history["seldom"]) == 201


def test_log_tells_what_happens(tmp_path: Path) -> None:
    module, events = network(), []
    phase = train(one_step(module), {"module": Optim(module.parameters())}, 4)
    run(tmp_path, phase, log=events.append, checkpoint_steps=2, log_seconds=0)
    assert [event["event"] for event in events] == [
        "phase-start",
        *["progress", "checkpoint", "progress", "progress", "progress"],
        "phase-end",
    ]
    assert events[-1]["loss/loss"] > 0 and events[1]["steps_per_second"] > 0


def test_steps_run_under_autocast_when_the_precision_is_bf16(tmp_path: Path) -> None:
    module = network()
    seen = []

    def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
        out = module(batch["train"]["x"])
        seen.append(out.dtype)
        yield Update("module", {"loss": out.float().square().mean()})
        seen.append(module(batch["train"]["x"]).dtype)

    run(tmp_path, train(step, {"module": Optim(module.parameters())}), precision="bf16")
    assert seen == [torch.bfloat16] * 2
    assert module[0].weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


# --- requests that cannot be met -------------------------------------------------------------------------------------


def refused(directory: Path, message: str, *phases: Train | Compute) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        run(directory, *phases)
    assert "\n" not in str(caught.value)


def test_update_is_refused_when_it_is_malformed(tmp_path: Path) -> None:
    module, other = network(), network()
    optimizers = {"module": Optim(list(module.parameters()))}

    def refuse(message: str, update: Callable[[Tensor], Any]) -> None:
        def step(batch: dict[str, Batch], i: int) -> Iterator[Update]:
            yield update(batch["train"]["x"])

        refused(tmp_path, message, train(step, optimizers))

    refuse("no optimiser of it: did you mean module", lambda x: Update("modul", {"loss": module(x).mean()}))
    refuse("has no losses", lambda x: Update("module", {}))
    refuse(
        r"loss 'map' .* must be a scalar tensor, not a tensor of shape \(4, 4\)",
        lambda x: Update("module", {"map": module(x)}),
    )
    refuse("must be a scalar tensor, not float", lambda x: Update("module", {"loss": 1.0}))  # type: ignore[dict-item]
    refuse("no loss .* reaches a parameter of 'module'", lambda x: Update("module", {"loss": other(x).mean()}))
    refuse(
        "no loss .* reaches a parameter of 'module'", lambda x: Update("module", {"loss": module(x).mean().detach()})
    )
    refuse("must yield Update objects, not 3", lambda x: 3)


def test_step_is_refused_when_it_is_no_generator(tmp_path: Path) -> None:
    module = network()
    phase = train(lambda batch, i: None, {"module": Optim(module.parameters())})  # type: ignore[arg-type,return-value]
    refused(tmp_path, "must yield Update objects, but returned NoneType", phase)


def test_owner_is_refused_when_somebody_froze_its_parameter(tmp_path: Path) -> None:
    module = network()
    module[0].weight.requires_grad_(False)
    phase = train(one_step(module), {"module": Optim(module.parameters())})
    refused(tmp_path, r"'module' owns a parameter of shape \(8, 4\) that is frozen", phase)


def test_optimizers_are_refused_when_they_cannot_be_made(tmp_path: Path) -> None:
    module = network()
    step = one_step(module)
    params = list(module.parameters())
    refused(tmp_path, "owns no parameter", train(step, {"module": Optim([])}))
    refused(tmp_path, "unknown optimiser 'adamv'", train(step, {"module": Optim(params, kind="adamv")}))  # type: ignore[arg-type]
    refused(tmp_path, r"cannot be made", train(step, {"module": Optim(params, options={"momentom": 1})}))
    refused(tmp_path, "own the same parameter", train(step, {"module": Optim(params), "twice": Optim(params[:1])}))
    refused(tmp_path, "must both have it", train(step, {"module": Optim(params)}, carry=("module",)))


def test_phases_are_refused_when_they_cannot_be_told_apart_or_stored(tmp_path: Path) -> None:
    module = network()
    twins = [train(one_step(module), {"module": Optim(module.parameters())}) for _ in range(2)]
    refused(tmp_path / "a", "two phases are named 'train'", *twins)
    refused(tmp_path / "b", "is no tensor or array of numbers", Compute("words", lambda: {"names": ["a", "b"]}))  # type: ignore[dict-item]
    stateless = train(one_step(module), {"module": Optim(module.parameters())}, state={"module": object()})
    refused(tmp_path / "c", "lacks state_dict", stateless)
