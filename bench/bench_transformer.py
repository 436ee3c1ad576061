"""Joint attention, one block and the whole MMDiT, eager and compiled; its share of the machine's rate."""

import copy
import statistics
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench import openvino_peer, peers, timing
from functional_sd3.core import attention, layers, prng, transform, tree
from functional_sd3.transformer import joint_block, mmdit
from functional_sd3.weights import prepack, quantize

TOKENS = 333
SIZES = {"256, 16x16": (4, 32, 6), "512, 32x32": (8, 64, 8), "1024, 32x32": (16, 64, 3)}
"""Width and patches -> heads of 64, side of the latents, blocks."""


def model(heads, side, depth, dtype=torch.float32):
    config = mmdit.Config(depth=depth, heads=heads, position_size=96, sample_size=side, qk_norm=True)
    pair = peers.transformer(config, dtype)
    keys = prng.split(prng.key(0), 3)
    latents = prng.normal(keys[0], (2, 16, side, side)).to(dtype)
    context, pooled = (
        prng.normal(key, (2, *shape)).to(dtype) for key, shape in zip(keys[1:], ((TOKENS, 4096), (2048,)), strict=True)
    )
    return pair, (latents, torch.full((2,), 0.7), context, pooled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_forward(versus, size, dtype):
    pair, (latents, t, context, pooled) = model(*SIZES[size], dtype)
    inputs = latents, context, pooled, 1000 * t
    # OpenVINO takes float32 and rounds by itself.
    module = copy.deepcopy(pair.module).float()
    versus(
        f"MMDiT forward, width {size} patches, {str(dtype)[6:]}, eager",
        lambda: mmdit.apply(pair.params, pair.config, latents, t, context, pooled),
        lambda: pair.module(latents, context, pooled, 1000 * t, return_dict=False)[0],
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
        memory=True,
        least=True,
        beside=openvino_peer.beside(
            lambda *given: module(*given, return_dict=False)[0], tuple(x.float() for x in inputs), module, dtype=dtype
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_prepacked_forward(versus, size, dtype):
    """Weights pre-packed beforehand, as OpenVINO's are when it compiles."""
    pair, given = model(*SIZES[size], dtype)
    packed = prepack.prepack(pair.params)
    module = copy.deepcopy(pair.module).float()
    latents, t, context, pooled = (x.float() for x in given)
    versus(
        f"MMDiT forward, width {size} patches, {str(dtype)[6:]}, eager, weights pre-packed",
        lambda: mmdit.apply(packed, pair.config, *given),
        lambda: mmdit.apply(pair.params, pair.config, *given),
        peer="plain weights here",
        tolerance=0.0,
        beside=openvino_peer.beside(
            lambda *inputs: module(*inputs, return_dict=False)[0],
            (latents, context, pooled, 1000 * t),
            module,
            dtype=dtype,
        ),
    )


@pytest.mark.parametrize("size", list(SIZES)[1:])
def test_forward_int8(versus, size):
    """Products of int8, all else in bfloat16, beside bfloat16 and float32 here and OpenVINO's bfloat16."""
    pair, (latents, t, context, pooled) = model(*SIZES[size])
    narrow = [x.to(torch.bfloat16) for x in (latents, context, pooled)]
    wide = tree.cast(pair.params, torch.bfloat16)
    params = quantize.quantize(wide, compute="int8")

    def forward(params, x, context, pooled):
        return lambda: mmdit.apply(params, pair.config, x, t, context, pooled)

    versus(
        f"MMDiT forward, width {size} patches, products of int8, eager",
        forward(params, *narrow),
        forward(wide, *narrow),
        peer="bfloat16 here",
        tolerance=5e-2,
        beside={"float32 here": timing.Beside(forward(pair.params, latents, context, pooled), 5e-2)}
        | openvino_peer.beside(
            lambda *given: pair.module(*given, return_dict=False)[0],
            (latents, context, pooled, 1000 * t),
            pair.module,
            dtype=torch.bfloat16,
        ),
    )


@pytest.mark.parametrize(
    "size, dtype", [*((size, torch.float32) for size in SIZES), (next(iter(SIZES)), torch.bfloat16)], ids=str
)
def test_compiled_forward(versus, size, dtype):
    heads, side, _ = SIZES[size]
    pair, (latents, t, context, pooled) = model(heads, side, 3, dtype)
    torch._dynamo.reset()
    ours = transform.compile(partial(mmdit.apply, config=pair.config), dynamic=False)
    theirs = torch.compile(pair.module, fullgraph=True, dynamic=False)
    with torch.no_grad():
        # What the compiler leaves as it is: of the eager module, since a compiled one shows no products.
        alone = timing.products(lambda: pair.module(latents, context, pooled, 1000 * t, return_dict=False)[0])
    versus(
        f"MMDiT forward, width {size} patches, 3 blocks, {str(dtype)[6:]}, compiled",
        lambda: ours(pair.params, latents=latents, t=t, context=context, pooled=pooled),
        lambda: theirs(latents, context, pooled, 1000 * t, return_dict=False)[0],
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
        compiled=True,
        least=alone,
    )


@pytest.fixture(scope="module")
def block():
    """One block of width 512 on 1,024 and 154 tokens, and what it is given."""
    pair, (_, _, _, pooled) = model(8, 64, 2)
    keys = prng.split(prng.key(1), 3)
    image, context, time = (prng.normal(key, (2, n, 512)) for key, n in zip(keys, (1024, TOKENS, 1), strict=True))
    return pair.module.transformer_blocks[0], pair.params["blocks"][0], image, context, time[:, 0]


def test_block(versus, block):
    module, params, image, context, time = block

    def ours():
        said = F.silu(time)
        modulation = {name: layers.linear(params[name]["modulation"], said) for name in params}
        return tuple(joint_block.apply(params, 8, {"image": image, "context": context}, modulation).values())

    versus(
        "one MMDiT block, width 512, 1,024 + 333 tokens, batch 2",
        ours,
        lambda: module(hidden_states=image, encoder_hidden_states=context, temb=time)[::-1],
        rounds=15,
        memory=True,
        least=True,
    )


@pytest.mark.parametrize("way", ["sdpa", "math", "compiled", "unfused qkv"])
def test_joint_attention(versus, block, way):
    module, params, image, context, _ = block
    implementation = "math" if way == "math" else "sdpa"

    def stream(own, x):
        if way == "unfused qkv":
            parts = [layers.linear(dict(zip(own["qkv"], part, strict=True)), x) for part in unfused(own["qkv"])]
        else:
            parts = layers.linear(own["qkv"], x).chunk(3, -1)
        query, key, value = (attention.split_heads(part, 8) for part in parts)
        normed = (layers.rms_norm(own[f"{n}_norm"], x, 1e-6) for n, x in (("query", query), ("key", key)))
        return attention.Stream(*normed, value)

    def unfused(own):
        return zip(*(leaf.chunk(3) for leaf in own.values()), strict=True)

    def joint(image, context):
        own = [params[name]["attention"] for name in ("image", "context")]
        streams = [stream(weights, x) for weights, x in zip(own, (image, context), strict=True)]
        attended = attention.joint_attention(streams, implementation=implementation)
        heads = [attention.merge_heads(x) for x in attended]
        return [layers.linear(weights["out"], x) for weights, x in zip(own, heads, strict=True)]

    run = transform.compile(joint, dynamic=False) if way == "compiled" else joint
    versus(
        f"joint attention with its projections, width 512, 1,024 + 333 tokens, {way}",
        lambda: run(image, context),
        lambda: module.attn(hidden_states=image, encoder_hidden_states=context),
        rounds=15,
        memory=way != "compiled",
        compiled=way == "compiled",
    )


def test_roofline(versus):
    from torch.utils.flop_counter import FlopCounterMode

    pair, (latents, t, context, pooled) = model(16, 64, 3)
    forward = partial(mmdit.apply, pair.params, pair.config, latents, t, context, pooled)
    a, b = prng.normal(prng.key(0), (2, 2048, 2048)).unbind()
    with torch.no_grad():
        # Of the other side, which has no fused products that the counter does not know.
        with FlopCounterMode(display=False) as counter:
            pair.module(latents, context, pooled, 1000 * t, return_dict=False)
        rates = {"product": lambda: a @ b, "forward": forward}
        seconds = {name: statistics.median(timing.timed(run)[0] for _ in range(9)) for name, run in rates.items()}
    rate, reached = 2 * 2048**3 / seconds["product"], counter.get_total_flops() / seconds["forward"]
    versus.record(
        "roofline: MMDiT forward, width 1024, float32",
        of_the_rate_of_matrix_products=f"{100 * reached / rate:.0f} % of {rate / 1e9:.0f} GFLOP/s",
    )


def test_cost_in_tokens(versus):
    """Attention never holds all pairs of tokens: memory has to grow as the tokens do."""
    cost = {}
    for side in (32, 64, 128):
        config = mmdit.Config(depth=2, heads=4, position_size=96, sample_size=side, qk_norm=True)
        params = mmdit.init(prng.key(0), config)
        keys = prng.split(prng.key(1), 3)
        inputs = prng.normal(keys[0], (1, 16, side, side)), torch.tensor(0.5)
        text = prng.normal(keys[1], (1, TOKENS, 4096)), prng.normal(keys[2], (1, 2048))
        with torch.no_grad():
            run = partial(mmdit.apply, params, config, *inputs, *text)
            run()
            cost[side**2 // 4] = (timing.allocated_peak(run), min(timing.timed(run)[0] for _ in range(3)))
    versus.record(
        "cost against tokens, width 256, 2 blocks",
        memory=", ".join(f"{count:,} tokens {peak / 2**20:.1f} MiB" for count, (peak, _) in cost.items()),
        time=", ".join(f"{count:,} tokens {1e3 * seconds:.0f} ms" for count, (_, seconds) in cost.items()),
    )
