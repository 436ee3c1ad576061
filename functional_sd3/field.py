"""The velocity field that a run follows: the transformer told of prompts, pictures and image prompts, and guided."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Params, Tree, Velocity
from functional_sd3.flow import guidance
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.transformer import control as controls
from functional_sd3.transformer import ip_adapter, mmdit
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.weights.model import Config


class Conditions(NamedTuple):
    """What the transformer is told, and what it is guided away from."""

    positive: Conditioning
    negative: Conditioning


def velocity(
    params: Params,
    config: Config,
    conditions: Conditions,
    cfg: float | Tensor = 5.0,
    times: Tensor | None = None,
    *,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
) -> Velocity:
    """The guided velocity field of the prompts: (x (batch, ...), t ()) -> dx/dt.

    times: (n,) all the times it will be asked at. The modulations of every block depend on the time and the pooled
    vector alone; they are then computed once for all of them, and a third of the weights is read once a picture
    instead of once a step. Without `times` any t goes, () or (batch,). control: ControlNets, which speak at every t;
    their start and end belong to `sample`. image_prompt: an IP-Adapter and features, of which what is guided away from
    sees zeros.
    """
    weights, sizes = params["transformer"], config.transformer
    for one in control:
        controls.check(one, sizes)
    pictures = controls.rows(control, len(conditions.positive.pooled))
    shown = ip_adapter.rows(image_prompt, len(conditions.positive.pooled))

    def evaluate(
        x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, pictures: Tree, shown: Tree, *rows: Tree
    ) -> Tensor:
        given = _at(rows, times, t) if rows else {"transformer": None, "control": None}
        told = [one._replace(**picture) for one, picture in zip(control, pictures, strict=True)]
        heard = controls.residuals(told, weights, sizes, x, t, context, pooled, modulations=given["control"])
        return mmdit.apply(
            weights,
            sizes,
            x,
            t,
            context,
            pooled,
            modulations=given["transformer"],
            skip_layers=skip_layers,
            residuals=heard.residuals,
            residual_after_last=heard.after_last,
            image_prompt=ip_adapter.prompt(image_prompt, shown, t, sizes),
        )

    def arguments(condition: Conditioning, shown: Tree) -> tuple:
        if times is None:
            return (*condition, pictures, shown)
        table = {
            "transformer": mmdit.modulations(weights, sizes, times[:, None], condition.pooled),
            "control": controls.modulations(control, times[:, None], condition.pooled),
        }
        # Batch first, as everything that guidance joins.
        return (*condition, pictures, shown, tree.map(lambda leaf: leaf.transpose(0, 1), table))

    unseen = {**shown, "features": torch.zeros_like(shown["features"])} if shown else {}
    return guidance.batched(
        evaluate, arguments(conditions.negative, unseen), arguments(conditions.positive, shown), cfg
    )


def _at(rows: Sequence[Any], times: Tensor, t: Tensor) -> Any:
    # Chosen by a tensor, not by a number, so that no value is read on the host.
    index = (times == t).to(torch.uint8).argmax().reshape(1)
    return tree.map(lambda leaf: leaf.index_select(1, index).squeeze(1), rows[0])
