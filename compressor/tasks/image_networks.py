"""What tasks ask of a network of images before work: that it takes the data's images and tells their classes apart."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compressor.data.dataset import DataInfo
from compressor.errors import CompressorError, RequestError
from compressor.models.image_network import ImageNetwork
from compressor.models.model import Model

__all__ = ["check_image_network"]


def check_image_network(model: Model, network: Callable[[Model], ImageNetwork], info: DataInfo) -> None:
    """Call a model on one black image of a set.

    Args:
        model: Its module is left in the mode that it was in.
        network: How the task calls it; gives logits (B, classes, ...).
        info: Shape and classes of the set.

    Raises:
        RequestError: It cannot take the images, or tells another number of classes apart.
    """
    name, classes = model.info.architecture, len(info.classes)
    channels = model.info.extra.get("channels")
    # A gray image fills the channels of a colour model; nothing else can be made to fit.
    if channels is not None and info.shape[0] not in (1, channels):
        raise RequestError(f"{name} takes images of {channels} channels, the set {info.name!r} has {info.shape[0]}")
    training, device = model.module.training, next(model.module.parameters()).device
    try:
        with torch.no_grad():
            model.module.eval()
            logits = network(model)(torch.zeros(1, *info.shape, device=device))
    except CompressorError:
        raise
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        shape = "x".join(map(str, info.shape))
        first = str(error).strip().partition("\n")[0]
        raise RequestError(f"{name} cannot take images of shape {shape}: {first}") from error
    finally:
        model.module.train(training)
    if logits.shape[1] != classes:
        # a user's own factory may have no such option
        own = model.info.library == "python" and not name.startswith("compressor.")
        hint = "" if own else f": a model of ?num_classes={classes} fits"
        raise RequestError(f"{name} tells {logits.shape[1]} classes apart, the set {info.name!r} has {classes}{hint}")
