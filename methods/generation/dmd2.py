"""DMD2 (Yin et al. 2024, arXiv 2405.14867): a generator of one to four steps with its teacher's distribution.

The difference of two denoisers, the frozen teacher and a copy that is trained all the time on the generator's own
outputs (the fake score), is the gradient of the divergence between their distributions. A GAN loss on noised images
lets the student pass its teacher. Trained: the generator, the fake score and its classification branch. Exported: the
generator.

The paper writes the GAN terms with ``log D``; the official code's softplus of logits is followed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import RequestError, nearest
from compressor.losses.adversarial import non_saturating_losses
from compressor.losses.precision import at_least_float32
from compressor.losses.surrogate import gradient_as_loss

__all__ = ["adversarial_losses", "distribution_matching_loss", "fake_score_loss", "student_timesteps"]


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
