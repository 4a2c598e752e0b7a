"""DataDAM (Sajedi et al. 2023, arXiv 2310.00093): a few images per class that random networks attend to like the data.

In networks drawn afresh at every step, the class means of the spatial attention maps of all layers but the last must
agree between real and synthetic images, and those of the final embeddings weakly. Trained: the pixels of the synthetic
images, then a student on them. Exported: the distilled set and the student.

Paper and official code differ in the power of the maps (4 against 1; the paper's is the default here) and in the scale:
the code sums over classes and multiplies by 100, which is followed.
"""

from __future__ import annotations

from torch import Tensor

from compressor.losses.features import spatial_attention_map
from compressor.losses.statistics import squared_class_mean_distance

__all__ = ["attention_matching_loss", "feature_matching_loss", "spatial_attention_map"]


def attention_matching_loss(
    real_features: Tensor, syn_features: Tensor, *, num_classes: int, power: float = 4.0, scale: float = 100.0
) -> Tensor:
    """Squared distance of the class-mean attention maps of one layer (one summand of the paper's ``L_SAM``).

    Maps are normalised before they are averaged over a class; the distance is summed over classes and positions.

    Args:
        real_features: ``(K * Nr, C, H, W)`` float, class-blocked, after the ReLU and before the pooling; detached.
        syn_features: ``(K * Ns, C, H, W)``, class-blocked in the same order; Ns may differ from Nr.
        num_classes: K.
        power: Exponent of the maps.
        scale: Factor of the sum.

    Returns:
        Scalar at least 0, of the features' dtype.
    """
    real_maps = spatial_attention_map(real_features.detach(), power=power)
    syn_maps = spatial_attention_map(syn_features, power=power)
    return scale * squared_class_mean_distance(real_maps, syn_maps, num_classes)


def feature_matching_loss(
    real_embeddings: Tensor,
    syn_embeddings: Tensor,
    *,
    num_classes: int,
    task_balance: float = 0.01,
    scale: float = 100.0,
) -> Tensor:
    """Squared distance of the class-mean embeddings (``L_MMD``, the term that stands in for the last layer's maps).

    Args:
        real_embeddings: ``(K * Nr, D)`` float, class-blocked, flattened output of the feature extractor; detached.
        syn_embeddings: ``(K * Ns, D)``, class-blocked in the same order; Ns may differ from Nr.
        num_classes: K.
        task_balance: The paper's lambda, the weight against the attention terms.
        scale: Factor of the sum, the same as that of the attention terms.

    Returns:
        Scalar at least 0, of the embeddings' dtype.
    """
    return scale * task_balance * squared_class_mean_distance(real_embeddings.detach(), syn_embeddings, num_classes)
