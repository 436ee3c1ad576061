"""Prior preservation of DreamBooth: images of the class are learned beside those of the subject.

Ruiz et al. 2023, "DreamBooth" (arXiv:2208.12242), eq. 2; as in diffusers' DreamBooth scripts the loss is the mean over
the subject's images plus `prior_weight` times the mean over the images of the class.
"""

from typing import Any

from torch import Tensor

from functional_sd3.core.types import Tree
from functional_sd3.training.objectives.flow import Samples, flow_loss
from functional_sd3.training.objectives.types import Loss, Metrics


def prior_loss(config: Any, *, prior_weight: float = 1.0, share: float = 0.5, **options: Any) -> Loss:
    """`flow_loss` of batches of which the part `share` preserves the prior; `options` are flow_loss's.

    batch: that of `flow_loss` with "prior" (batch,), 1 for images of the class and 0 for those of the subject. The
    loss is mean over the subject + prior_weight * mean over the class, for a batch that is divided by `share`; taken in
    parts, the mean of the parts' losses is the loss of the whole. Metrics: subject_loss and prior_loss, the two means
    before weights. Raises ValueError for a share not within 0 and 1, and a weight that is no finite number above 0.
    """
    if not 0 < share < 1:
        raise ValueError(f"share {share} of the prior's images in a batch must be above 0 and below 1")
    if not 0 < prior_weight < float("inf"):
        raise ValueError(f"prior_weight {prior_weight} must be a positive number, such as 1; without it use flow_loss")

    def summary(samples: Samples, batch: Tree) -> tuple[Tensor, Metrics]:
        prior = batch["prior"].to(samples.losses.dtype)
        of_prior, of_subject = prior / share, (1 - prior) / (1 - share)
        weighted = samples.losses if samples.weights is None else samples.weights * samples.losses
        value = ((of_subject + prior_weight * of_prior) * weighted).mean()
        parts = {"subject_loss": of_subject, "prior_loss": of_prior}
        return value, {name: (part * samples.losses).mean() for name, part in parts.items()}

    return flow_loss(config, summary=summary, **options)
