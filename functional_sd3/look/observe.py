"""Observers of a run by values: a guidance that shows what it combines, and evaluations that keep maps of attention."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core.attention import Stream, joint_attention
from functional_sd3.core.types import Params, Tree
from functional_sd3.flow import guidance as guidances
from functional_sd3.flow import ode
from functional_sd3.flow.guidance import POSITIVE, Guidance, Velocities
from functional_sd3.layouts.components import Config, require
from functional_sd3.look import tokens
from functional_sd3.look.maps import WordMaps, word_maps
from functional_sd3.look.record import Attention, Group
from functional_sd3.look.tokens import Prompt
from functional_sd3.pipeline.encoding import conditions_of
from functional_sd3.pipeline.fields import velocities
from functional_sd3.pipeline.prepare import Prepared
from functional_sd3.pipeline.sampling import chosen_method
from functional_sd3.transformer import control as controls
from functional_sd3.transformer.joint_block import Attend


def observed(guidance: Guidance, see: Callable[[Velocities, Tensor, Tensor], None]) -> Guidance:
    """The same guidance; `see(velocities, guided velocity, t)` is called with each of its evaluations."""

    def combine(velocities: Velocities, x: Tensor, t: Tensor, carry: Tree) -> tuple[Tensor, Tree]:
        guided, carry = guidance.combine(velocities, x, t, carry)
        see(velocities, guided, t)
        return guided, carry

    def at(step: int, steps: int) -> Guidance:
        return observed(guidances.at(guidance, step, steps), see)

    return guidance._replace(combine=combine, at=None if guidance.at is None else at)


def groups_of(prompt: Prompt) -> tuple[tuple[Group, ...], Tensor]:
    """The groups of a prompt's tokens, and (groups, context tokens): 1 where a token is in a group, each in one."""
    groups: list[Group] = []
    rows: list[Tensor] = []
    total = prompt.clip_tokens + prompt.t5_tokens
    places: dict[tokens.Stream, slice] = {"clip": slice(0, prompt.clip_tokens), "t5": slice(prompt.clip_tokens, total)}
    for stream, rest in places.items():
        left = torch.zeros(total, dtype=torch.float32, device="cpu")
        left[rest] = 1
        for word in range(len(prompt.words)):
            if positions := prompt.positions(stream, word):
                row = torch.zeros_like(left)
                row[list(positions)] = 1
                groups.append(Group(stream, word))
                rows.append(row)
                left = left - row
        groups.append(Group(stream, None))
        rows.append(left)
    return tuple(groups), torch.stack(rows)


def attention_of(
    params: Params,
    config: Config,
    prepared: Prepared,
    prompt: Prompt,
    states: Tensor,
    times: Tensor,
    steps: Sequence[int],
    blocks: Sequence[int],
) -> Attention:
    """Attention between image and words when the prompt's velocity is evaluated at the states that `steps` start from.

    Each is one evaluation of the transformer for one sample; weights are reduced block by block as it runs.
    """
    sampling = prepared.request.sampling
    conditions = conditions_of(prepared.prompts)
    groups, membership = groups_of(prompt)
    method = chosen_method(config, 1, sampling.method, prepared.keys)
    is_mean = not isinstance(method, ode.Adaptive) and method.mean
    active = controls.segments(sampling.control, len(times) - 1)
    size = require(config, "transformer").patch_size
    grid = tuple(side // size for side in states.shape[-2:])
    of_steps = []
    for step in steps:
        seen: dict[int, WordMaps] = {}
        field = velocities(
            params,
            config,
            type(conditions)(*(type(half)(*(part.to(states.device) for part in half)) for half in conditions)),
            {"positive": POSITIVE},
            ends=times[step + 1] if is_mean else None,
            skip_layers=sampling.skip_layers,
            control=next(nets for first, stop, nets in active if first <= step < stop),
            image_prompt=sampling.image_prompt,
            attend=_recording(sampling.attend, require(config, "transformer").depth, blocks, membership, seen),
            implementation=sampling.implementation,
        )
        field(states[step][None], times[step])
        of_steps.append([_laid_out(seen[block], grid) for block in blocks if block in seen])
    kept = tuple(block for block in blocks if block in seen)
    to_words, from_words, image = (
        torch.stack([torch.stack([maps[part] for maps in of_blocks]) for of_blocks in of_steps]) for part in range(3)
    )
    return Attention(groups, tuple(steps), kept, to_words, from_words, image)


def _recording(
    attend: Any, depth: int, blocks: Sequence[int], membership: Tensor, seen: dict[int, WordMaps]
) -> Mapping[int, Attend]:
    """The attention of every block, with the maps of the `blocks` put into `seen`; a second attention, over the image
    alone, has no words."""

    def of(block: int) -> Attend:
        own = attend.get(block) if isinstance(attend, Mapping) else attend

        def record(streams: Sequence[Stream]) -> list[Tensor | None]:
            if len(streams) == 2 and block in blocks:
                seen[block] = word_maps(streams, membership)
            return own(list(streams)) if own else joint_attention(streams)

        return record

    return {block: of(block) for block in range(depth)}


def _laid_out(maps: WordMaps, grid: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (groups, height, width), (groups, height, width) and (height, width) of the one sample, float32."""
    to_words = maps.to_words[0].unflatten(-1, grid).float()
    absent = torch.full_like(to_words, torch.nan)
    from_words = absent if maps.from_words is None else maps.from_words[0].unflatten(-1, grid).float()
    return to_words, from_words, maps.image[0].unflatten(-1, grid).float()
