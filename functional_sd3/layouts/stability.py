"""The names of SD3's tensors in Stability's files, as tables of rules (ours, theirs).

Their one-file checkpoints hold the transformer under `model.diffusion_model.` and the VAE under `first_stage_model.`;
all-in-one files add `text_encoders.{clip_l,clip_g,t5xxl}.transformer.`, whose names below the prefix are transformers'.
Facts: Stability-AI/sd3.5 `mmditx.py`, `sd3_impls.py`; diffusers' `single_file_utils.py`.
"""

from functional_sd3.formats.sources import FUSE
from functional_sd3.layouts import diffusers_keys
from functional_sd3.layouts.rules import FROM_CONV, Layout, Rule, renamed, then

TRANSFORMER_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
ENCODER_PREFIXES = {
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
CLIP = diffusers_keys.CLIP
T5 = diffusers_keys.T5._replace(
    # Stability's own reference reads the second name only, everyone else the first.
    copies=(("shared.weight", "encoder.embed_tokens.weight"),)
)


def _stream(ours: str, theirs: str, attention: str, of_theirs: str) -> tuple[Rule, ...]:
    return renamed(
        (f"{ours}.{attention}.qkv.{{leaf}}", f"{theirs}.{of_theirs}.qkv.{{leaf}}"),
        (f"{ours}.{attention}.out.{{leaf}}", f"{theirs}.{of_theirs}.proj.{{leaf}}"),
        (f"{ours}.{attention}.query_norm.{{leaf}}", f"{theirs}.{of_theirs}.ln_q.{{leaf}}"),
        (f"{ours}.{attention}.key_norm.{{leaf}}", f"{theirs}.{of_theirs}.ln_k.{{leaf}}"),
    )


def _streams() -> tuple[Rule, ...]:
    rules: tuple[Rule, ...] = ()
    for ours, theirs in (("image", "x_block"), ("context", "context_block")):
        ours, theirs = f"blocks.{{i}}.{ours}", f"joint_blocks.{{i}}.{theirs}"
        rules += _stream(ours, theirs, "attention", "attn")
        rules += _stream(ours, theirs, "attention2", "attn2")
        rules += renamed(
            (f"{ours}.modulation.{{leaf}}", f"{theirs}.adaLN_modulation.1.{{leaf}}"),
            (f"{ours}.mlp.in.{{leaf}}", f"{theirs}.mlp.fc1.{{leaf}}"),
            (f"{ours}.mlp.out.{{leaf}}", f"{theirs}.mlp.fc2.{{leaf}}"),
        )
    return rules


TRANSFORMER = Layout(
    (
        *renamed(
            ("position", "pos_embed"),
            ("patch.{leaf}", "x_embedder.proj.{leaf}"),
            ("time.in.{leaf}", "t_embedder.mlp.0.{leaf}"),
            ("time.out.{leaf}", "t_embedder.mlp.2.{leaf}"),
            ("interval.in.{leaf}", "interval_embedder.mlp.0.{leaf}"),
            ("interval.out.{leaf}", "interval_embedder.mlp.2.{leaf}"),
            ("pooled.in.{leaf}", "y_embedder.mlp.0.{leaf}"),
            ("pooled.out.{leaf}", "y_embedder.mlp.2.{leaf}"),
            ("context.{leaf}", "context_embedder.{leaf}"),
            ("final.modulation.{leaf}", "final_layer.adaLN_modulation.1.{leaf}"),
            ("final.out.{leaf}", "final_layer.linear.{leaf}"),
        ),
        *_streams(),
    )
)


_RESNET = (("shortcut", "nin_shortcut"), ("{part}", "{part}"))


def vae(levels: int) -> Layout:
    """The layout of a VAE of `levels` resolutions: theirs counts the decoder's from the largest images down."""
    rules = [
        *renamed(
            ("{side}.conv_in.{leaf}", "{side}.conv_in.{leaf}"),
            ("{side}.norm_out.{leaf}", "{side}.norm_out.{leaf}"),
            ("{side}.conv_out.{leaf}", "{side}.conv_out.{leaf}"),
            ("{side}.middle.block1.{part}.{leaf}", "{side}.mid.block_1.{part}.{leaf}"),
            ("{side}.middle.block2.{part}.{leaf}", "{side}.mid.block_2.{part}.{leaf}"),
            ("{side}.middle.attention.norm.{leaf}", "{side}.mid.attn_1.norm.{leaf}"),
        ),
        # Their attention is of 1x1 convolutions.
        Rule(
            "{side}.middle.attention.qkv.weight",
            tuple(f"{{side}}.mid.attn_1.{name}.weight" for name in "qkv"),
            then(FROM_CONV, FUSE),
        ),
        Rule("{side}.middle.attention.qkv.bias", tuple(f"{{side}}.mid.attn_1.{name}.bias" for name in "qkv"), FUSE),
        Rule("{side}.middle.attention.out.weight", ("{side}.mid.attn_1.proj_out.weight",), FROM_CONV),
        *renamed(("{side}.middle.attention.out.bias", "{side}.mid.attn_1.proj_out.bias")),
        *renamed(("encoder.levels.{i}.resample.{leaf}", "encoder.down.{i}.downsample.conv.{leaf}")),
    ]
    for ours, theirs in _RESNET:
        rules += renamed(
            (f"encoder.levels.{{i}}.blocks.{{j}}.{ours}.{{leaf}}", f"encoder.down.{{i}}.block.{{j}}.{theirs}.{{leaf}}")
        )
    for level in range(levels):
        here, there = f"decoder.levels.{level}", f"decoder.up.{levels - 1 - level}"
        rules += renamed((f"{here}.resample.{{leaf}}", f"{there}.upsample.conv.{{leaf}}"))
        for ours, theirs in _RESNET:
            rules += renamed((f"{here}.blocks.{{j}}.{ours}.{{leaf}}", f"{there}.block.{{j}}.{theirs}.{{leaf}}"))
    return Layout(tuple(rules))
