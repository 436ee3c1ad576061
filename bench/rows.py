"""The comparisons: this project beside diffusers and transformers, the same random weights on both sides."""

import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch

from bench.timing import Row, compare
from functional_sd3.core import prng
from functional_sd3.image import vae
from functional_sd3.text import clip, t5
from functional_sd3.transformer import mmdit
from functional_sd3.weights import diffusers_keys, layout


def ours_from(model: torch.nn.Module, keys: layout.Layout, spec) -> dict:
    """The parameters of a library's module in our tree, random but for norms, which stay near one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7 / fan_in**0.5)
    theirs = {name: value.detach() for name, value in model.state_dict().items()}
    theirs = {meant: theirs[name] for name, meant in layout.canonical(keys, theirs).items()}
    return layout.to_ours(keys, spec, lambda source, _: source.transform.join([theirs[name] for name in source.names]))


def transformer(depth: int = 8, heads: int = 8, side: int = 64, tokens: int = 333, batch: int = 2) -> Row:
    """MMDiT forward, eager, float32: hidden 512, 8 blocks, 64 x 64 latents, 333 context tokens."""
    from diffusers import SD3Transformer2DModel

    config = mmdit.Config(depth=depth, heads=heads, position_size=96, sample_size=side, qk_norm=True)
    model = SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=16,
        num_layers=depth,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=4096,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=96,
        qk_norm="rms_norm",
    ).eval()
    params = ours_from(model, diffusers_keys.TRANSFORMER, mmdit.spec(config))
    keys = prng.split(prng.key(0), 3)
    latents = prng.normal(keys[0], (batch, 16, side, side))
    context, pooled = prng.normal(keys[1], (batch, tokens, 4096)), prng.normal(keys[2], (batch, 2048))
    t = torch.full((batch,), 0.7)
    return compare(
        f"MMDiT forward, hidden {64 * heads}, {depth} blocks, {side // 2}x{side // 2} + {tokens} tokens, batch {batch}",
        lambda: mmdit.apply(params, config, latents, t, context, pooled),
        lambda: model(latents, context, pooled, 1000 * t, return_dict=False)[0],
    )


def decoder(side: int = 256) -> Row:
    """The decoder of the true SD3 autoencoder."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=vae.SD3_VAE.channels,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    params = ours_from(model, diffusers_keys.VAE, vae.spec(vae.SD3_VAE))
    latents = prng.normal(prng.key(0), (1, 16, side // 8, side // 8))
    return compare(
        f"VAE decode, {side}x{side}",
        lambda: vae.decode(params, vae.SD3_VAE, latents),
        lambda: model.decode(latents, return_dict=False)[0],
    )


def t5_encoder(layers: int = 4, width: int = 1024, length: int = 256) -> Row:
    """T5 forward at reduced size."""
    from transformers import T5Config, T5EncoderModel

    config = t5.Config(vocab=1000, width=width, layers=layers, heads=16, mlp_width=5 * width // 2)
    model = T5EncoderModel(
        T5Config(
            vocab_size=1000,
            d_model=width,
            d_kv=64,
            d_ff=5 * width // 2,
            num_layers=layers,
            num_heads=16,
            feed_forward_proj="gated-gelu",
            dense_act_fn="gelu_new",
        )
    ).eval()
    params = ours_from(model, diffusers_keys.T5, t5.spec(config))
    ids = prng.randint(prng.key(0), (2, length), 0, 1000)
    return compare(
        f"T5 forward, width {width}, {layers} layers, {length} tokens, batch 2",
        lambda: t5.apply(params, config, ids),
        lambda: model(ids).last_hidden_state,
    )


def clip_encoder(layers: int = 12) -> Row:
    """CLIP-L forward at its true size."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = clip.Config(layers=layers)
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            projection_dim=config.projection_width,
            num_hidden_layers=layers,
            num_attention_heads=config.heads,
        )
    ).eval()
    params = ours_from(model, diffusers_keys.CLIP, clip.spec(config))
    ids = prng.randint(prng.key(0), (2, 77), 0, config.vocab)
    return compare(
        f"CLIP-L forward, {layers} layers, 77 tokens, batch 2",
        lambda: clip.apply(params, config, ids).last,
        lambda: model(ids).last_hidden_state,
    )


def imports(rounds: int = 7) -> Row:
    """`import functional_sd3` beside `import torch`, each in a fresh process."""
    seconds: dict[str, list[float]] = {"functional_sd3": [], "torch": []}
    for _ in range(rounds):
        for name, samples in seconds.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
            samples.append(time.perf_counter() - start)
    return compare_samples("import functional_sd3 / import torch", seconds["functional_sd3"], seconds["torch"])


def compare_samples(name: str, ours: list[float], theirs: list[float]) -> Row:
    import statistics

    quarters, median = statistics.quantiles(ours, n=4), statistics.median(ours)
    return Row(name, median, statistics.median(theirs), (quarters[2] - quarters[0]) / median, 0.0)


ROWS: dict[str, Callable[[], Row]] = {
    "imports": imports,
    "clip": clip_encoder,
    "t5": t5_encoder,
    "vae": decoder,
    "transformer": transformer,
}


def run(names: list[str]) -> list[Row]:
    """The rows asked for, one after another."""
    rows = []
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.append(ROWS[name]())
        print(f"{rows[-1].name}: {rows[-1].ratio:.2f}", flush=True)
    return rows
