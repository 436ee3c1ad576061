"""A training step that updates each parameter within the backward pass, as soon as its gradient is complete.

Lv et al. 2023, "Full parameter fine-tuning for large language models with limited resources" (arXiv:2306.09782, LOMO):
gradients are never in memory all at once, but no rule can depend on all of them, such as clipping by the global norm.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Params, Tree
from functional_sd3.parallel import sharding
from functional_sd3.parallel.mesh import BATCH_AXES, ONE_PROCESS, Mesh
from functional_sd3.parallel.placement import Layout
from functional_sd3.training import optim, step
from functional_sd3.training.objectives import Loss, Metrics
from functional_sd3.training.step import TrainState


def make_fused_step(
    loss: Loss,
    optimizer: optim.Optimizer,
    *,
    trainable: tree.Chooser = "*",
    ema_decay: float = 0.9999,
    rate: optim.Schedule | None = None,
    rounding: str = "nearest",
    mesh: Mesh | None = None,
    layout: Layout | None = None,
    own_rows: bool = False,
) -> Callable[[TrainState, Tree], tuple[TrainState, Metrics]]:
    """The step of `step.make_train_step` with `donate=True`, without the memory of the gradients.

    The given state is updated in place, and must not be used after. Metrics are the same: the norm is that of all
    gradients, of which only the norms are kept. mesh, layout, own_rows: as in `make_train_step`; a gradient is summed
    over the processes when it is complete, in the order of the backward pass, which is the same on all of them. Raises
    ValueError for an optimiser that needs all gradients at once.
    """
    mesh = mesh or ONE_PROCESS
    count = mesh.size(*BATCH_AXES)
    positions = sharding.positions(layout, mesh)
    placements = {} if layout is None else tree.flatten_paths(layout)
    optimizer = step.on_parts(optimizer, layout, mesh)
    if optimizer.by_leaf is None:
        raise ValueError(
            "the optimiser needs all gradients at once, as clipping by the global norm and Muon do: only one that has "
            "`by_leaf`, such as adamw or adamw8bit alone, can update in the backward pass"
        )
    by_leaf = optimizer.by_leaf

    def fused_step(state: TrainState, batch: Tree) -> tuple[TrainState, Metrics]:
        batch, keys = step.rows_and_keys(state, batch, mesh, own_rows, undivided=False)
        learned, fixed = tree.partition(state.params, trainable)
        optim.check_donated({"params": learned, "ema": state.ema, "optimizer": state.optimizer})
        is_stochastic = rounding == "stochastic"
        weights_key, ema_key = step.step_roundings(state, positions) if is_stochastic else (None, None)
        update_leaf, optimizer_state = by_leaf(state.optimizer, learned)
        norms: dict[str, Tensor] = {}

        def update(path: str, gradient: Tensor) -> None:
            with torch.no_grad():
                gradient = sharding.sum_gradient(gradient, placements.get(path), mesh, divisor=count)
                norms[path] = optim.global_norm(gradient)
                update_leaf(path, gradient, None, weights_key)

        value, reported = _backward(loss, learned, fixed, batch, keys, update)
        with torch.no_grad():
            norm = sharding.norm(tree.map_with_path(lambda path, leaf: norms[path], learned), layout, mesh)
            value, reported = sharding.mean((value, reported), mesh)
            metrics = {"loss": value, "grad_norm": norm, **reported}
            if rate is not None:
                metrics["rate"] = rate(state.step)
            ema = optim.ema_update(state.ema, state.params, ema_decay, state.step, donate=True, key=ema_key)
        return TrainState(state.params, optimizer_state, ema, state.step + 1, state.key), metrics

    return fused_step


def _backward(
    loss: Loss, learned: Params, fixed: Params, batch: Tree, keys: Tensor, update: Callable[[str, Tensor], None]
) -> tuple[Tensor, Metrics]:
    """Value and metrics of the loss; `update(path, gradient)` is called once for each leaf, as soon as it has one."""
    waiting = tree.flatten_paths(learned)

    def tracked(path: str, leaf: Tensor) -> Tensor:
        alias = leaf.detach().requires_grad_()

        def on_gradient(alias: Tensor) -> None:
            gradient, alias.grad = alias.grad, None
            assert gradient is not None
            del waiting[path]
            update(path, gradient)

        alias.register_post_accumulate_grad_hook(on_gradient)
        return alias

    # Every operation that read a parameter has run backwards when its gradient is complete, so that writing into its
    # memory changes nothing that is still needed.
    with torch.enable_grad():
        params = tree.map_with_path(tracked, learned)
        value, metrics = loss(tree.combine(params, fixed), batch, keys)
        if value.requires_grad:
            value.backward()
    for path, leaf in list(waiting.items()):
        update(path, torch.zeros_like(leaf))
    return value.detach(), {name: metric.detach() for name, metric in metrics.items()}
