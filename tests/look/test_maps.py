"""Maps of attention: the softmax of the formula in float64, rows that sum to one, memory linear in the tokens."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from functional_sd3.core import prng, tree
from functional_sd3.core.attention import Stream
from functional_sd3.look.maps import word_maps
from functional_sd3.look.observe import _recording
from functional_sd3.transformer import mmdit
from tests import models

GROUPS = torch.tensor([[0.0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 1]])


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *(leaf.numel() for leaf in made)])
        return result


def stream(tokens: int, *, seed: int, has_queries: bool = True, heads: int = 3, dtype=torch.float64) -> Stream:
    parts = [3 * part.to(dtype) for part in prng.normal(prng.key(seed), (3, 1, heads, tokens, 8))]
    return Stream(parts[0] if has_queries else None, *parts[1:])


def formula(streams) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) of the plain formula, the mean over the heads: (queries, keys)."""
    query = torch.cat([each.query for each in streams if each.query is not None], 2)[0]
    scores = query @ torch.cat([each.key for each in streams], 2)[0].transpose(-1, -2) / math.sqrt(query.shape[-1])
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return weights.mean(0)


@pytest.mark.parametrize("has_queries", [True, False], ids=["joint", "last block"])
def test_maps_equal_the_softmax_of_the_formula(has_queries):
    streams = [stream(300, seed=1, heads=16), stream(5, seed=2, heads=16, has_queries=has_queries)]
    maps, weights = word_maps(streams, GROUPS), formula(streams)
    for index, group in enumerate(GROUPS.bool()):
        torch.testing.assert_close(maps.to_words[0, index], weights[:300, 300:][:, group].sum(1))
        if has_queries:
            torch.testing.assert_close(maps.from_words[0, index], weights[300:, :300][group].mean(0))
    torch.testing.assert_close(maps.image[0], weights[:300, :300].sum(1))
    assert (maps.from_words is None) == (not has_queries)


def test_rows_sum_to_one():
    maps = word_maps([stream(40, seed=3), stream(5, seed=4)], GROUPS)
    torch.testing.assert_close(maps.to_words.sum(1) + maps.image, torch.ones_like(maps.image))


def test_a_group_without_tokens_has_no_weights():
    maps = word_maps([stream(4, seed=3), stream(5, seed=4)], torch.zeros(1, 5))
    assert not maps.to_words.any() and not maps.from_words.any()


@pytest.mark.parametrize(
    "sizes",
    [{"dual_attention_layers": (0, 1)}, {"dual_attention_layers": (), "qk_norm": False}],
    ids=["SD3.5, dual attention", "SD3"],
)
def test_every_kind_of_block_of_a_random_model_gives_the_maps_of_its_formula(sizes):
    """In float64: blocks with a second attention, without norms of queries and keys, and the last one."""
    config = models.config(**sizes).transformer
    params = tree.map(torch.Tensor.double, models.random_leaves(mmdit.spec(config)))
    keys = prng.split(prng.key(5), 3)
    shapes = ((1, 16, 8, 8), (1, 5, config.context_width), (1, config.pooled_width))
    latents, context, pooled = (prng.normal(key, shape).double() for key, shape in zip(keys, shapes, strict=True))
    t = torch.tensor(0.6, dtype=torch.float64)
    maps, expected = {}, {}

    def by_formula(block):
        def attend(streams):
            attended, weights = [], formula(streams)
            if len(streams) == 2:
                expected[block] = weights
            every = [(each.query, torch.cat([one.key for one in streams], 2)) for each in streams]
            values = torch.cat([one.value for one in streams], 2)
            for query, key in every:
                scores = None if query is None else query @ key.transpose(-1, -2) / math.sqrt(key.shape[-1])
                attended.append(None if scores is None else torch.softmax(scores, -1) @ values)
            return attended

        return attend

    options = {block: by_formula(block) for block in range(config.depth)}
    plain = mmdit.apply(params, config, latents, t, context, pooled, attend=options)
    seen = _recording(None, config.depth, range(config.depth), GROUPS, maps)
    velocity = mmdit.apply(params, config, latents, t, context, pooled, attend=seen)
    torch.testing.assert_close(velocity, plain)
    assert sorted(maps) == list(range(config.depth))
    for block, weights in expected.items():
        image = weights[:16, 16:] @ GROUPS.double().T
        torch.testing.assert_close(maps[block].to_words[0], image.T, rtol=1e-8, atol=1e-12)
        last = block == config.depth - 1
        assert (maps[block].from_words is None) == last
        if not last:
            mean = GROUPS.double() / GROUPS.sum(1, keepdim=True)
            torch.testing.assert_close(maps[block].from_words[0], mean @ weights[16:, :16], rtol=1e-8, atol=1e-12)


def test_memory_is_linear_in_the_tokens():
    """No tensor is as large as the square of the tokens, and twice the image tokens give no larger blocks of scores."""
    largest = []
    for tokens in (2048, 4096):
        streams = [
            stream(tokens, seed=1, heads=1, dtype=torch.float32),
            stream(5, seed=2, heads=1, dtype=torch.float32),
        ]
        with Largest() as seen:
            word_maps(streams, GROUPS)
        largest.append(seen.elements)
    assert largest[0] < 2048**2 / 8 and largest[1] <= 2.01 * largest[0]


def test_a_network_whose_maps_are_kept_has_no_tensor_of_the_square_of_its_tokens():
    config = models.config(depth=2, position_size=48).transformer
    params, maps, tokens = models.random_leaves(mmdit.spec(config)), {}, 48 * 48 + 5
    shapes = ((1, 16, 96, 96), (1, 5, config.context_width), (1, config.pooled_width))
    latents, context, pooled = (prng.normal(prng.key(seed), shape) for seed, shape in enumerate(shapes))
    t = torch.tensor(0.5)
    attend = _recording(None, config.depth, range(config.depth), GROUPS, maps)
    with torch.no_grad(), Largest() as seen:
        mmdit.apply(params, config, latents, t, context, pooled, attend=attend)
    assert sorted(maps) == [0, 1] and maps[0].to_words.shape == (1, 3, 48 * 48)
    assert seen.elements < tokens**2 / 4
