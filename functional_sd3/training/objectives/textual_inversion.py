"""Textual inversion: the rectified-flow loss as a function of the embedding vectors of a new word alone.

Gal et al. 2022, "An Image is Worth One Word" (arXiv:2208.01618), eq. 2.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.text import textual_inversion
from functional_sd3.training.objectives.flow import flow_loss
from functional_sd3.training.objectives.types import Loss, Metrics


def inversion_loss(
    config: Any, base: Params, first: Mapping[str, int], *, objective: Callable[..., Loss] = flow_loss, **options: Any
) -> Loss:
    """`objective` of the frozen model `base` whose encoders have the vectors in `params` as further embeddings.

    params: {encoder: (vectors, width)} for the encoders in `first`, the id of each one's first vector, of which
    `textual_inversion.first_ids` tells. config: of the model with the word (`textual_inversion.add`). batch: that of
    `flow_loss`, with "ids" in which the word occurs. `options` and metrics are flow_loss's.
    """
    loss = objective(config, **options)

    def of_vectors(params: Mapping[str, Tensor], batch: Tree, keys: Key) -> tuple[Tensor, Metrics]:
        return loss(textual_inversion.with_vectors(base, params, first), batch, keys)

    return of_vectors
