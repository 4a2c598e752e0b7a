"""Launched in two processes: the checks that need several. Writes what it finds as JSON and safetensors."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from toy_methods import Countdown, Killed, kill_at, network, run_toy, same_bits

from compressor.errors import CheckpointError, CompressorError, DivergedError, InterruptedRunError, RequestError
from compressor.training.distributed import Distributed
from compressor.training.engine import Engine
from compressor.training.phase import Optim, Phases, Train, Update
from compressor.training.random import Randomness
from compressor.training.update import backward_by_stashing


def main(directory: Path) -> None:
    distributed = Distributed("cpu")
    found: dict[str, Any] = {"processes": distributed.processes, "device": str(distributed.device)}
    toy, engine = run_toy(directory / "whole", distributed=distributed, batch=4, dropout=0.0)
    found["history"] = engine.history
    found["equal_on_all"] = all_equal(distributed, toy.result())
    if distributed.is_main:
        save_file(toy.result(), directory / "result.safetensors")
    found["collectives"] = collectives(distributed)
    found["failure"] = failure_of_main(distributed)
    found["guard"] = one_process_not_finite(distributed, directory / "guard")
    found["diverged"] = one_process_diverges(distributed, directory / "diverged")
    found["partial"] = loss_of_one_process(distributed, directory / "partial")
    found["norms"] = batch_norms(distributed, directory / "norms")
    found["start"] = different_start(distributed, directory / "start")
    found["resumed"] = resumed(distributed, directory / "resumed")
    found["sharded"] = sharded(distributed)
    everything = [found]
    if distributed.is_main:
        (directory / "found.json").write_text(json.dumps(everything[0]))
    distributed.close()


def all_equal(distributed: Distributed, tensors: dict[str, torch.Tensor]) -> bool:
    return distributed.all(same_bits(tensors, distributed.broadcast_object(tensors)))


def collectives(distributed: Distributed) -> dict[str, Any]:
    rank = distributed.rank
    return {
        "mean": distributed.reduce(torch.tensor([1.0, 2.0 * rank])).tolist(),
        "sum": distributed.reduce(torch.tensor(rank + 1), "sum").item(),
        "half": distributed.reduce(torch.tensor([1.0 + rank]).bfloat16()).tolist(),
        "gather": distributed.gather(torch.arange(rank + 1) + 10 * rank).tolist(),
        "gather_flags": distributed.gather(torch.tensor([rank == 1])).tolist(),
        "gather_scalar": distributed.gather(torch.tensor(float(rank))).tolist(),
        "broadcast": distributed.broadcast_object({"rank": rank}),
        "shard": distributed.gather(torch.tensor(list(distributed.shard(7)))).tolist(),
        "all": [distributed.all(True), distributed.all(rank == 0)],
    }


def failure_of_main(distributed: Distributed) -> bool:
    def fail() -> None:
        raise CheckpointError("no room")

    try:
        distributed.on_main(fail)
    except CompressorError as error:
        return distributed.all(str(error) == "no room")
    return distributed.all(False)


def run(distributed: Distributed, directory: Path, phase: Train) -> list[dict[str, Any]]:
    def phases() -> Phases:
        yield phase

    events: list[dict[str, Any]] = []
    randomness = Randomness(0, distributed.rank, distributed.processes)
    engine = Engine(directory, distributed=distributed, randomness=randomness, fingerprint="", log=events.append)
    engine.run(phases())
    return events


def one_process_not_finite(distributed: Distributed, directory: Path) -> dict[str, Any]:
    weight, answers = nn.Parameter(torch.ones(1)), []

    def step(batch: dict[str, Any], i: int) -> Iterator[Update]:
        bad = i == 1 and distributed.rank == 1
        answers.append((yield Update("w", {"loss": (math.nan if bad else 1.0) * weight.sum()})))

    run(distributed, directory, Train("t", 3, {"w": Optim([weight], kind="sgd", lr=0.25)}, {}, step, {}))
    return {"answers": answers, "equal": all_equal(distributed, {"w": weight.detach()}), "weight": weight.item()}


def one_process_diverges(distributed: Distributed, directory: Path) -> bool:
    weight = nn.Parameter(torch.ones(1))

    def step(batch: dict[str, Any], i: int) -> Iterator[Update]:
        yield Update("w", {"loss": (math.inf if distributed.rank == 1 else 1.0) * weight.sum()})

    try:
        run(distributed, directory, Train("t", 30, {"w": Optim([weight])}, {}, step, {}))
    except DivergedError:
        return distributed.all(True)
    return distributed.all(False)


def loss_of_one_process(distributed: Distributed, directory: Path) -> float:
    """Only one process has a sample of the kind that a loss is about."""
    weight, other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def step(batch: dict[str, Any], i: int) -> Iterator[Update]:
        loss = 4 * weight.sum() if distributed.rank == 1 else torch.zeros(())
        yield Update("both", {"loss": loss})

    run(distributed, directory, Train("t", 1, {"both": Optim([weight, other], kind="sgd", lr=1.0)}, {}, step, {}))
    return weight.item()


def batch_norms(distributed: Distributed, directory: Path) -> bool:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    randomness = Randomness(0, distributed.rank, distributed.processes)

    def step(batch: dict[str, Any], i: int) -> Iterator[Update]:
        yield Update("m", {"loss": module(randomness.normal(i, (4, 4))).square().mean()})

    torch.manual_seed(0)
    module[0].reset_parameters()
    run(distributed, directory, Train("t", 3, {"m": Optim(module.parameters())}, {}, step, {"m": module}))
    return all_equal(distributed, module.state_dict())


def different_start(distributed: Distributed, directory: Path) -> str:
    weight = nn.Parameter(torch.full((1,), float(distributed.rank)))

    def step(batch: dict[str, Any], i: int) -> Iterator[Update]:
        yield Update("w", {"loss": weight.sum()})

    message = "none"
    try:
        run(distributed, directory, Train("t", 1, {"w": Optim([weight])}, {}, step, {}))
    except RequestError as error:
        message = str(error)
    return str(distributed.gather(torch.tensor([message != "none"])).tolist())


def resumed(distributed: Distributed, directory: Path) -> list[bool]:
    """Killed, or one process told to stop, and resumed: the same bits, dropout and held gradients included."""
    whole, _ = run_toy(directory / "whole", distributed=distributed)
    same = []
    for event in (7, 17):
        try:
            run_toy(directory / str(event), kill_at(event), distributed=distributed, checkpoint_steps=1)
        except Killed:
            pass
        toy, _ = run_toy(directory / str(event), distributed=distributed)
        same.append(same_bits(toy.result(), whole.result()))
    signalled = Countdown(15 if distributed.rank == 1 else -1, lambda: signal.raise_signal(signal.SIGTERM))
    try:
        run_toy(directory / "signal", signalled, distributed=distributed, checkpoint_steps=None)
        same.append(False)
    except InterruptedRunError as error:
        same.append("saved at step 1 of phase '0-toy/together'" in str(error))
    toy, _ = run_toy(directory / "signal", distributed=distributed)
    same.append(same_bits(toy.result(), whole.result()))
    return [distributed.all(flag) for flag in same]


def sharded(distributed: Distributed) -> dict[str, Any]:
    """A GAN turn on fully sharded modules gives the weights of the unsharded one; the critic receives nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (distributed.processes,))
    results = []
    for shard in (False, True):
        torch.manual_seed(0)
        generator, critic = network(), network()
        if shard:
            for module in (generator, critic):
                fully_shard(module, mesh=mesh)
        whole = Randomness(0).normal(0, (8, 4))
        x = whole.chunk(2)[distributed.rank] if shard else whole
        optimizer = torch.optim.SGD(generator.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            loss = critic(generator(x)).square().mean()
            owned, others = list(generator.parameters()), list(critic.parameters())
            backward_by_stashing(loss, owned, others)
            leak = any(parameter.grad is not None for parameter in others)
            optimizer.step()
        weights = [p.full_tensor() if shard else p for p in generator.parameters()]
        results.append(torch.cat([weight.detach().reshape(-1) for weight in weights]))
    return {"difference": (results[0] - results[1]).abs().max().item(), "leak": leak}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
