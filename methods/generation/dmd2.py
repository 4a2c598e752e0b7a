"""DMD2 (Yin et al. 2024, arXiv 2405.14867): a generator of one to four steps with its teacher's distribution.

The difference of two denoisers, the frozen teacher and a copy that is trained all the time on the generator's own
outputs (the fake score), is the gradient of the divergence between their distributions. A GAN loss on noised images
lets the student pass its teacher. Trained: the generator, the fake score and its classification branch. Exported: the
generator, with its few steps.

The paper writes the GAN terms with ``log D``; the official code's softplus of logits is followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.data.stream import Batch
from compressor.diffusion.denoiser import Denoiser
from compressor.diffusion.discriminators import make_head
from compressor.diffusion.rollout import backward_simulation, level_between, ode_samples, renoise
from compressor.diffusion.student_attention import AttentionConfig, with_attention
from compressor.errors import RequestError, nearest
from compressor.losses.adversarial import non_saturating_losses
from compressor.losses.precision import at_least_float32
from compressor.losses.surrogate import gradient_as_loss
from compressor.method import Context, MethodConfig, Needs, OneStudent, Paper
from compressor.models.anatomy.blocks import BlockStack
from compressor.models.edits.low_rank import adaptable, merged
from compressor.models.model import Model
from compressor.training.averaging import Ema
from compressor.training.curves import linear_warmup
from compressor.training.phase import Compute, Optim, Phases, Train, Update

__all__ = [
    "DMD2",
    "METHOD",
    "DMD2Config",
    "adversarial_losses",
    "distribution_matching_loss",
    "fake_score_loss",
    "student_timesteps",
]


# --- The mathematics -------------------------------------------------------------------------------------------------


def distribution_matching_loss(latents: Tensor, pred_real: Tensor, pred_fake: Tensor) -> tuple[Tensor, Tensor]:
    """The generator's distribution-matching loss, whose gradient leads from the fake to the real distribution.

    DMD, eqs. 7 and 8 (x0 form): ``gradient = (pred_fake - pred_real) / mean |latents - pred_real|``, the mean over each
    sample's entries.

    Args:
        latents: ``(B, ...)`` float, the generator's clean samples.
        pred_real: The same shape: the teacher's (guided) estimate of them from a noised copy.
        pred_fake: The same shape: the fake score's estimate from the same noised copy, without guidance.

    Returns:
        ``(loss, gradient)``: the scalar ``0.5 * mean(gradient ** 2)``, whose derivative by ``latents`` is
        ``gradient / numel`` and which says nothing of progress; and the detached gradient ``(B, ...)``. Both in the
        widest of the dtypes and float32; non-finite entries are replaced as `torch.nan_to_num` does.
    """
    with torch.no_grad():
        dtype = torch.promote_types(torch.promote_types(latents.dtype, pred_real.dtype), pred_fake.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        sample, real, fake = latents.to(dtype), pred_real.to(dtype), pred_fake.to(dtype)
        distance = (sample - real).abs().reshape(len(sample), -1).mean(dim=1)
        distance = distance.reshape(-1, *[1] * (latents.dim() - 1))
        gradient = torch.nan_to_num((fake - real) / distance)
    return gradient_as_loss(latents, gradient), gradient


def fake_score_loss(
    prediction: Tensor,
    latents: Tensor,
    noise: Tensor | None = None,
    sigma: Tensor | None = None,
    prediction_type: str = "epsilon",
    sigma_data: float = 0.5,
) -> Tensor:
    """Denoising loss of the fake score on the generator's samples (DMD, eq. 6).

    Args:
        prediction: ``(B, ...)`` float, what the fake score predicts, of the kind that ``prediction_type`` names.
        latents: The same shape: the generator's samples; detached.
        noise: The same shape: the noise in the fake score's input; for "epsilon" and "velocity".
        sigma: ``(B,)``: the noise's standard deviation, above 0; for "x0".
        prediction_type: "epsilon": mean squared error to the noise. "velocity": to ``noise - latents`` (flow matching).
            "x0": to ``latents``, weighted by ``sigma ** -2 + sigma_data ** -2`` (EDM).
        sigma_data: Standard deviation of the data, for "x0".

    Returns:
        Scalar, float32 or wider.

    Raises:
        RequestError: The prediction type is unknown, or what it needs is missing.
    """
    kinds = ("epsilon", "velocity", "x0")
    if prediction_type not in kinds:
        raise RequestError(f"unknown prediction type {prediction_type!r}: {nearest(prediction_type, kinds)}")
    prediction, latents = at_least_float32(prediction), at_least_float32(latents.detach())
    if prediction_type == "x0":
        if sigma is None:
            raise RequestError('the fake-score loss of "x0" predictions needs sigma')
        weight = at_least_float32(sigma) ** -2 + sigma_data**-2
        weight = weight.reshape(-1, *[1] * (latents.dim() - 1))
        return (weight * (prediction - latents).square()).mean()
    if noise is None:
        raise RequestError(f'the fake-score loss of "{prediction_type}" predictions needs the noise')
    target = noise if prediction_type == "epsilon" else noise - latents
    return (prediction - target).square().mean()


def adversarial_losses(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The GAN losses of generator and classification branch, unweighted (section 4.3, in softplus form).

    Args:
        real_logits: Any shape, the branch's logits on noised real images.
        fake_logits: Any shape, its logits on noised generated ones.

    Returns:
        ``(generator, discriminator)``, scalars, safe for logits of any size. Nothing is detached here.
    """
    return non_saturating_losses(real_logits, fake_logits)


def student_timesteps(num_inference_steps: int, num_train_timesteps: int = 1000) -> Tensor:
    """The timesteps that the generator is called at, noisiest first: ``T - 1 - i * floor(T / N)`` (section 4.4).

    Args:
        num_inference_steps: N, from 1 to T.
        num_train_timesteps: T of the teacher's schedule.

    Returns:
        ``(N,)`` int64: 999, 749, 499, 249 for four steps.

    Raises:
        RequestError: N is not in 1..T.
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise RequestError(f"num_inference_steps must be in 1..{num_train_timesteps}, not {num_inference_steps}")
    stride = num_train_timesteps // num_inference_steps
    return num_train_timesteps - 1 - stride * torch.arange(num_inference_steps)


def denoising_loss(
    denoiser: Denoiser, latents: Tensor, noise: Tensor, level: Tensor, condition: Mapping[str, Tensor]
) -> Tensor:
    """`fake_score_loss` of a denoiser, whatever it predicts.

    Args:
        denoiser: The fake score.
        latents: ``(B, C, H, W)``, the generator's samples; detached.
        noise: The same shape.
        level: ``(B,)`` levels of the denoiser's schedule.
        condition: Condition fields (B, ...).

    Returns:
        Scalar.
    """
    latents, schedule = latents.detach(), denoiser.schedule
    prediction = denoiser.predict(schedule.add_noise(latents, noise, level), level, condition)
    signal, sigma = schedule.factors(level, latents)
    if schedule.prediction_type == "epsilon":
        return fake_score_loss(prediction, latents, noise)
    if schedule.prediction_type == "flow":
        return fake_score_loss(prediction, latents, noise, prediction_type="velocity")
    if schedule.prediction_type == "v_prediction":  # the velocity of the pair as it was scaled
        return fake_score_loss(prediction, sigma * latents, signal * noise, prediction_type="velocity")
    return fake_score_loss(prediction, latents, sigma=(sigma / signal).flatten(), prediction_type="x0")


# --- The method ------------------------------------------------------------------------------------------------------


class Stage(MethodConfig):
    """A stage of training; its optimisers start afresh."""

    steps: int = Field(ge=0)
    """Iterations, one update of the fake score each; 0 leaves the stage out."""
    lr: float = Field(gt=0)
    """Learning rate of the generator."""
    fake_lr: float = Field(gt=0)
    """Learning rate of the fake score and its classification branch."""
    warmup: int = Field(500, ge=0)
    """Iterations of linear warm-up, at most half of the stage's."""


class WarmStart(MethodConfig):
    """The regression that starts a one-step generator: noise to what the teacher's ODE makes of it."""

    steps: int = Field(0, ge=0)
    """Iterations; 0 leaves it out."""
    lr: float = Field(1e-5, gt=0)
    """Learning rate of the generator."""
    pairs: int = Field(10_000, ge=1)
    """Pairs of noise and sample, made once and stored."""
    ode_steps: int = Field(50, ge=1)
    """Steps of the teacher's ODE for a pair."""


class DMD2Config(AttentionConfig):
    """Configuration of DMD2."""

    num_steps: int = Field(4, ge=1)
    """Steps of the generator at inference, each a call and, but for the last, new noise."""
    guidance: float = Field(1.0, ge=0)
    """Classifier-free guidance of the teacher; at most 1 means none. The student learns it and runs without."""
    conditioning_timestep: int | None = Field(None, ge=0)
    """Timestep of a one-step generator's only call, its input pure noise (SDXL: 399); None takes the noisiest."""
    fake_updates: int = Field(5, ge=1)
    """Updates of the fake score for one of the generator (the two time scales)."""
    gan_weight: float = Field(5e-3, ge=0)
    """Weight of the GAN loss in the generator's update, in the stage "adversarial"."""
    head_weight: float = Field(1e-2, ge=0)
    """Weight of the classification branch's loss in the fake score's update, there."""
    features: Literal["fake", "teacher"] = "fake"
    """Whose middle features the classification branch reads: the fake score's (paper) or the frozen teacher's."""
    noise_range: tuple[float, float] = (0.02, 0.98)
    """Share of the noise levels between which distributions are matched; the other losses take all levels."""
    lora_rank: int | None = Field(None, ge=1)
    """Train low-rank adapters of the generator instead of its weights (SDXL: 64); they are merged at the end."""
    lora_alpha: float = Field(8.0, gt=0)
    """Scale of the adapters, over their rank."""
    batch: int = Field(32, ge=1)
    """Samples an iteration and process."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging coefficients."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled weight decay."""
    clip_norm: float = Field(10.0, gt=0)
    """Largest norm of a gradient, generator and fake score each."""
    ema: float | None = Field(None, ge=0, lt=1)
    """Decay of an average of the generator's weights that becomes the student; None takes the last weights."""
    warm_start: WarmStart = WarmStart()
    """Regression on pairs of the teacher's ODE before the rest, for generators of one step."""
    match: Stage = Stage(steps=1000, lr=1e-5, fake_lr=1e-5)
    """Distribution matching alone."""
    adversarial: Stage = Stage(steps=200, lr=5e-7, fake_lr=5e-7)
    """Distribution matching with the GAN loss."""


class DMD2(OneStudent[DMD2Config]):
    """The method; see the module's docstring."""

    name: ClassVar[str] = "dmd2"
    paper: ClassVar[Paper] = Paper(
        "Improved Distribution Matching Distillation for Fast Image Synthesis",
        "Yin, Gharbi, Park, Zhang, Shechtman, Durand, Freeman",
        "NeurIPS 2024",
        "https://arxiv.org/abs/2405.14867",
    )
    idea: ClassVar[str] = "Make the distribution of a one- to four-step generator's samples equal the teacher's."
    needs: ClassVar[Needs] = Needs(
        tasks=("image-generation",),
        teachers={"teacher": "one"},
        students={"student": "copy"},
        data={"train": frozenset({"image", "label"})},
    )
    Config: ClassVar[type[MethodConfig]] = DMD2Config
    default_recipe: ClassVar[Mapping[str, Any]] = {
        "teachers": {"teacher": "demo:digits-mmdit"},
        "data": {"train": "digits"},
        "data_config": {
            "gan_weight": 0.02,
            "head_weight": 0.1,
            "betas": [0.0, 0.999],
            "ema": 0.95,
            "match": {"steps": 500, "lr": 1e-4, "fake_lr": 2e-4, "warmup": 0},
            "adversarial": {"steps": 100, "lr": 5e-5, "fake_lr": 1e-4, "warmup": 0},
        },
    }

    def phases(self, ctx: Context) -> Phases:
        """Match distributions, then match them with the GAN, each with optimisers of its own."""
        task: Any = ctx.task
        config, teacher = self.config, ctx.teacher()
        student = self._adapted(with_attention(ctx.student(like=teacher), config, task.info.shape))
        self._ctx, self._shape, self._view, self._classes = ctx, task.info.shape, task.view, len(task.info.classes)
        self._real, self._generator, self._fake = Denoiser(teacher), Denoiser(student), Denoiser(teacher.copy())
        self._table = task.conditions(teacher)
        if config.guidance > 1 and self._table.null_row is None:
            raise RequestError("guidance needs an empty condition, and the data name no null_row: set guidance to 1")
        low, high = config.noise_range
        if not 0 <= low < high <= 1:
            raise RequestError(f"noise_range must rise within 0 and 1, got {low:g} to {high:g}")
        timesteps = self._timesteps()
        self._levels = self._real.schedule.sampling_level(timesteps).to(ctx.device)
        self._head = self._make_head()
        self._ema = None if config.ema is None else Ema(student.module, config.ema)
        extra = {**student.info.extra, "student_timesteps": timesteps.tolist()}
        shipped = student.module if self._ema is None else self._ema.module
        self._student = Model(shipped, replace(student.info, extra=extra))
        if config.warm_start.steps:
            key = [config.warm_start.model_dump(exclude={"steps", "lr"}), config.guidance]
            pairs = (yield Compute("pairs", self._ode_pairs, key=key)) or {}
            yield self._train_on_pairs(pairs)
        yield self._train("match", config.match, gan=False)
        yield self._train("adversarial", config.adversarial, gan=True)
        self._student = merged(self._student)

    def _adapted(self, student: Model) -> Model:
        """The generator, with adapters if the configuration wants them."""
        rank = self.config.lora_rank
        if rank is None:
            return student
        weights = adaptable(student.module, rank)
        if not weights:
            raise RequestError(f"dmd2.lora_rank is {rank}, no weight of the generator is larger than such an adapter")
        return student.edit("low_rank.adapt", rank=rank, alpha=self.config.lora_alpha, weights=weights)

    # -- warm start --

    @torch.no_grad()
    def _ode_pairs(self) -> dict[str, Tensor]:
        """Noises, condition rows and the samples that the teacher's ODE, guided, makes of them."""
        task: Any = self._ctx.task
        start, batch = self.config.warm_start, self.config.batch
        found: dict[str, list[Tensor]] = {"noise": [], "row": [], "sample": []}
        for k in range(-(-start.pairs // batch)):
            generator = self._ctx.rng(k, "pairs", shared=True)
            noise = torch.randn((batch, *self._shape), generator=generator).to(self._ctx.device)
            rows = torch.randint(task.conditions_asked, (batch,), generator=generator).to(self._ctx.device)
            condition = self._table(rows)
            sample = ode_samples(
                self._real, noise, condition, start.ode_steps, self._empty(), scale=self.config.guidance
            )
            for name, value in {"noise": noise, "row": rows, "sample": sample}.items():
                found[name].append(value.cpu())
        return {name: torch.cat(values)[: start.pairs] for name, values in found.items()}

    def _train_on_pairs(self, pairs: Mapping[str, Tensor]) -> Train:
        """The mean squared error between the generator's only call and the ODE's sample of the same noise.

        The paper takes LPIPS, which needs a pretrained network and pixels.
        """
        config, ctx, start = self.config, self._ctx, self.config.warm_start

        def step(batches: Mapping[str, Batch], i: int) -> Iterator[Update]:
            chosen = torch.floor(ctx.uniform(i, config.batch, "pair").cpu() * len(pairs["row"])).long()
            noise, rows, sample = (pairs[name][chosen].to(ctx.device) for name in ("noise", "row", "sample"))
            made = self._generator.clean(noise, self._levels[:1].expand(len(noise)), self._table(rows))
            stepped = yield Update("generator", {"pairs": (made - sample).square().mean()})
            if stepped and self._ema is not None:
                self._ema.update()

        options = {"betas": config.betas, "weight_decay": config.weight_decay}
        parameters = _trainable(self._generator)
        optim = Optim(parameters, lr=start.lr, options=options, clip_norm=config.clip_norm)
        state: dict[str, Any] = {"generator": self._generator} | ({} if self._ema is None else {"ema": self._ema})
        modes: Any = [(self._generator, "eval")]
        return Train("warm_start", start.steps, {"generator": optim}, {}, step, state, modes, key=start.model_dump())

    # -- one iteration --

    def _step(self, batches: Mapping[str, Batch], i: int, *, gan: bool) -> Iterator[Update]:
        """The generator (every K-th time), then the fake score on the same samples."""
        config, turn = self.config, i % self.config.fake_updates == 0
        condition = self._table(self._rows(batches, i))
        with torch.set_grad_enabled(turn):
            sample = self._generate(condition, i)
        if turn:
            losses = {"matching": self._matching(sample, condition, i)}
            if gan:
                logits = self._logits(sample, condition, i, "gan")  # through the fake score, which is not the owner
                losses["gan"] = config.gan_weight * adversarial_losses(torch.zeros_like(logits), logits)[0]
            stepped = yield Update("generator", losses)
            if stepped and self._ema is not None:
                self._ema.update()
        sample = sample.detach()
        level = level_between(self._fake.schedule, self._uniform(i, "score"))
        losses = {"score": denoising_loss(self._fake, sample, self._noise(i, "score"), level, condition)}
        if gan:
            real = batches["real"]
            told = self._logits(real["image"], self._table(real["label"]), i, "real")
            guessed = self._logits(sample, condition, i, "generated")
            losses["head"] = config.head_weight * adversarial_losses(told, guessed)[1]
        yield Update("fake", losses)

    def _generate(self, condition: Mapping[str, Tensor], i: int) -> Tensor:
        """Clean samples from a call that all processes agree on; only that call carries gradients."""
        stop = int(torch.randint(len(self._levels), (), generator=self._ctx.rng(i, "stop", shared=True)))
        noised, level = backward_simulation(
            self._generator, self._levels, stop, condition, lambda number: self._noise(i, f"call-{number}")
        )
        return self._generator.clean(noised, level, condition)

    def _matching(self, sample: Tensor, condition: Mapping[str, Tensor], i: int) -> Tensor:
        """The distribution-matching loss: teacher and fake score on one noised copy, the teacher alone guided."""
        config = self.config
        with torch.no_grad():
            noise, uniform = self._noise(i, "matching"), self._uniform(i, "matching")
            noised, level = renoise(self._real.schedule, sample, noise, uniform, *config.noise_range)
            real = self._real.clean(noised, level, condition, self._empty(), config.guidance)
            fake = self._fake.clean(noised, level, condition)
        return distribution_matching_loss(sample, real, fake)[0]

    def _logits(self, image: Tensor, condition: Mapping[str, Tensor], i: int, tag: str) -> Tensor:
        """The classification branch's logits (B, 1) of noised images, all noise levels."""
        watcher = self._fake if self.config.features == "fake" else self._real
        noised, level = renoise(watcher.schedule, image, self._noise(i, tag), self._uniform(i, tag))
        logits: Tensor = self._head(watcher.bottleneck(noised, level, condition))
        return logits

    # -- parts --

    def _timesteps(self) -> Tensor:
        """The timesteps of the generator's calls.

        Raises:
            RequestError: ``conditioning_timestep`` or the warm start with several steps, or outside the schedule.
        """
        config, levels = self.config, self._real.schedule.levels
        if config.num_steps > 1 and config.warm_start.steps:
            raise RequestError("dmd2.warm_start is for one-step generators: set num_steps to 1")
        if config.conditioning_timestep is None:
            return student_timesteps(config.num_steps, levels)
        if config.num_steps > 1:
            raise RequestError("dmd2.conditioning_timestep is for one-step generators: set num_steps to 1")
        if config.conditioning_timestep >= levels:
            raise RequestError(f"dmd2.conditioning_timestep must be below {levels}, not {config.conditioning_timestep}")
        return torch.tensor([config.conditioning_timestep])

    def _make_head(self) -> nn.Module:
        """The classification branch, for feature maps as the teacher makes them of this data."""
        with torch.no_grad():
            zeros = torch.zeros(1, *self._shape, device=self._ctx.device)
            condition = self._table(torch.zeros(1, dtype=torch.long, device=self._ctx.device))
            features = self._real.bottleneck(zeros, self._levels[:1], condition)
        return make_head(features, tokens=isinstance(self._real.net, BlockStack))

    def _train(self, name: str, stage: Stage, *, gan: bool) -> Train:
        config, ctx = self.config, self._ctx
        options = {"betas": config.betas, "weight_decay": config.weight_decay}
        schedule = linear_warmup(min(stage.warmup, stage.steps // 2))

        def optim(module: nn.Module, lr: float) -> Optim:
            return Optim(_trainable(module), lr=lr, options=options, schedule=schedule, clip_norm=config.clip_norm)

        trained = nn.ModuleList([self._fake, self._head]) if gan else self._fake
        streams = {}
        if not self._classes:
            streams["asked"] = ctx.stream("train", config.batch, view=self._view, tag="asked")
        if gan:
            streams["real"] = ctx.stream("train", config.batch, view=self._view, tag="real")
        state: dict[str, Any] = {"generator": self._generator, "fake": self._fake, "head": self._head}
        # in training mode some classes drop labels at random (DiT), which would be no noise that anybody asked for
        evaluated = [(module, "eval") for module in (self._generator, self._fake)]
        return Train(
            name,
            stage.steps,
            {"generator": optim(self._generator, stage.lr), "fake": optim(trained, stage.fake_lr)},
            streams,
            lambda batches, i: self._step(batches, i, gan=gan),
            state | ({} if self._ema is None else {"ema": self._ema}),
            modes=evaluated,  # type: ignore[arg-type]
            key=config.model_dump(mode="json", exclude={"match", "adversarial"}),
        )

    def _rows(self, batches: Mapping[str, Batch], i: int) -> Tensor:
        """Condition rows (B,): classes uniformly, prompts as often as the data hold them."""
        if not self._classes:
            rows: Tensor = batches["asked"]["label"]
            return rows
        return torch.floor(self._uniform(i, "class") * self._classes).long()

    def _empty(self) -> dict[str, Tensor] | None:
        """The empty condition of every sample, if the teacher is guided."""
        if self.config.guidance <= 1 or self._table.null_row is None:
            return None
        return self._table(torch.full((self.config.batch,), self._table.null_row, device=self._ctx.device))

    def _noise(self, i: int, tag: str) -> Tensor:
        return self._ctx.normal(i, (self.config.batch, *self._shape), tag).to(self._ctx.device)

    def _uniform(self, i: int, tag: str) -> Tensor:
        return self._ctx.uniform(i, self.config.batch, tag).to(self._ctx.device)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    """What adapters leave to be trained; all parameters where there are none."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


METHOD = DMD2
