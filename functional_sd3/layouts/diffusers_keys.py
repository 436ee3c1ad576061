"""The names of SD3's tensors in diffusers and transformers, as tables of rules (ours, theirs).

As `SD3Transformer2DModel`, `AutoencoderKL`, `CLIPTextModelWithProjection` and `T5EncoderModel` write them.
"""

import torch

from functional_sd3.formats.sources import FUSE
from functional_sd3.layouts.rules import SWAP_HALVES, Default, Layout, Rule, renamed


def _qkv(ours: str, theirs: str, names: tuple[str, str, str]) -> Rule:
    return Rule(ours, tuple(f"{theirs}.{name}.{{leaf}}" for name in names), FUSE)


_IMAGE, _CONTEXT, _BLOCK = "blocks.{i}.image", "blocks.{i}.context", "transformer_blocks.{i}"
_TO_QKV = ("to_q", "to_k", "to_v")

TRANSFORMER = Layout(
    rules=(
        # Scale precedes shift where there is no gate: in the final layer, and in the context of the last block.
        Rule("final.modulation.{leaf}", ("norm_out.linear.{leaf}",), SWAP_HALVES),
        Rule(
            _CONTEXT + ".modulation.{leaf}",
            (_BLOCK + ".norm1_context.linear.{leaf}",),
            SWAP_HALVES,
            unless=_CONTEXT + ".mlp.in.weight",
        ),
        *renamed(
            ("position", "pos_embed.pos_embed"),
            ("patch.{leaf}", "pos_embed.proj.{leaf}"),
            ("time.in.{leaf}", "time_text_embed.timestep_embedder.linear_1.{leaf}"),
            ("time.out.{leaf}", "time_text_embed.timestep_embedder.linear_2.{leaf}"),
            ("interval.in.{leaf}", "time_text_embed.interval_embedder.linear_1.{leaf}"),
            ("interval.out.{leaf}", "time_text_embed.interval_embedder.linear_2.{leaf}"),
            ("pooled.in.{leaf}", "time_text_embed.text_embedder.linear_1.{leaf}"),
            ("pooled.out.{leaf}", "time_text_embed.text_embedder.linear_2.{leaf}"),
            ("context.{leaf}", "context_embedder.{leaf}"),
            ("final.out.{leaf}", "proj_out.{leaf}"),
            (_IMAGE + ".modulation.{leaf}", _BLOCK + ".norm1.linear.{leaf}"),
            (_IMAGE + ".attention.query_norm.{leaf}", _BLOCK + ".attn.norm_q.{leaf}"),
            (_IMAGE + ".attention.key_norm.{leaf}", _BLOCK + ".attn.norm_k.{leaf}"),
            (_IMAGE + ".attention.out.{leaf}", _BLOCK + ".attn.to_out.0.{leaf}"),
            (_IMAGE + ".attention2.query_norm.{leaf}", _BLOCK + ".attn2.norm_q.{leaf}"),
            (_IMAGE + ".attention2.key_norm.{leaf}", _BLOCK + ".attn2.norm_k.{leaf}"),
            (_IMAGE + ".attention2.out.{leaf}", _BLOCK + ".attn2.to_out.0.{leaf}"),
            (_IMAGE + ".mlp.in.{leaf}", _BLOCK + ".ff.net.0.proj.{leaf}"),
            (_IMAGE + ".mlp.out.{leaf}", _BLOCK + ".ff.net.2.{leaf}"),
            (_CONTEXT + ".modulation.{leaf}", _BLOCK + ".norm1_context.linear.{leaf}"),
            (_CONTEXT + ".attention.query_norm.{leaf}", _BLOCK + ".attn.norm_added_q.{leaf}"),
            (_CONTEXT + ".attention.key_norm.{leaf}", _BLOCK + ".attn.norm_added_k.{leaf}"),
            (_CONTEXT + ".attention.out.{leaf}", _BLOCK + ".attn.to_add_out.{leaf}"),
            (_CONTEXT + ".mlp.in.{leaf}", _BLOCK + ".ff_context.net.0.proj.{leaf}"),
            (_CONTEXT + ".mlp.out.{leaf}", _BLOCK + ".ff_context.net.2.{leaf}"),
        ),
        _qkv(_IMAGE + ".attention.qkv.{leaf}", _BLOCK + ".attn", _TO_QKV),
        _qkv(_IMAGE + ".attention2.qkv.{leaf}", _BLOCK + ".attn2", _TO_QKV),
        _qkv(_CONTEXT + ".attention.qkv.{leaf}", _BLOCK + ".attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
    )
)

_DOWN, _UP = "encoder.down_blocks.{i}", "decoder.up_blocks.{i}"
_ATTENTION = "{side}.mid_block.attentions.0"

VAE = Layout(
    rules=(
        *renamed(
            ("{side}.conv_in.{leaf}", "{side}.conv_in.{leaf}"),
            ("encoder.levels.{i}.resample.{leaf}", _DOWN + ".downsamplers.0.conv.{leaf}"),
            ("encoder.levels.{i}.blocks.{j}.shortcut.{leaf}", _DOWN + ".resnets.{j}.conv_shortcut.{leaf}"),
            ("encoder.levels.{i}.blocks.{j}.{part}.{leaf}", _DOWN + ".resnets.{j}.{part}.{leaf}"),
            ("decoder.levels.{i}.resample.{leaf}", _UP + ".upsamplers.0.conv.{leaf}"),
            ("decoder.levels.{i}.blocks.{j}.shortcut.{leaf}", _UP + ".resnets.{j}.conv_shortcut.{leaf}"),
            ("decoder.levels.{i}.blocks.{j}.{part}.{leaf}", _UP + ".resnets.{j}.{part}.{leaf}"),
            ("{side}.middle.block1.{part}.{leaf}", "{side}.mid_block.resnets.0.{part}.{leaf}"),
            ("{side}.middle.block2.{part}.{leaf}", "{side}.mid_block.resnets.1.{part}.{leaf}"),
            ("{side}.middle.attention.norm.{leaf}", _ATTENTION + ".group_norm.{leaf}"),
            ("{side}.middle.attention.out.{leaf}", _ATTENTION + ".to_out.0.{leaf}"),
            ("{side}.norm_out.{leaf}", "{side}.conv_norm_out.{leaf}"),
            ("{side}.conv_out.{leaf}", "{side}.conv_out.{leaf}"),
        ),
        _qkv("{side}.middle.attention.qkv.{leaf}", _ATTENTION, _TO_QKV),
    )
)

_LAYER = "text_model.encoder.layers.{i}"

CLIP = Layout(
    rules=(
        *renamed(
            ("token_embedding.{leaf}", "text_model.embeddings.token_embedding.{leaf}"),
            ("position_embedding.{leaf}", "text_model.embeddings.position_embedding.{leaf}"),
            ("blocks.{i}.norm1.{leaf}", _LAYER + ".layer_norm1.{leaf}"),
            ("blocks.{i}.attention.out.{leaf}", _LAYER + ".self_attn.out_proj.{leaf}"),
            ("blocks.{i}.norm2.{leaf}", _LAYER + ".layer_norm2.{leaf}"),
            ("blocks.{i}.mlp.in.{leaf}", _LAYER + ".mlp.fc1.{leaf}"),
            ("blocks.{i}.mlp.out.{leaf}", _LAYER + ".mlp.fc2.{leaf}"),
            ("final_norm.{leaf}", "text_model.final_layer_norm.{leaf}"),
            ("projection.{leaf}", "text_projection.{leaf}"),
        ),
        _qkv("blocks.{i}.attention.qkv.{leaf}", _LAYER + ".self_attn", ("q_proj", "k_proj", "v_proj")),
    ),
    # Newer transformers leave the wrapper out.
    aliases=tuple(
        (f"{part}.{{*rest}}", f"text_model.{part}.{{*rest}}") for part in ("embeddings", "encoder", "final_layer_norm")
    ),
    # Counted positions, which older transformers saved.
    ignored=("text_model.embeddings.position_ids", "embeddings.position_ids", "logit_scale"),
    # Files of CLIP-L without one mean the identity, as diffusers and Stability's reference have it.
    defaults=(
        Default(
            "projection.weight",
            lambda shape: shape[0] == shape[1],
            lambda shape: torch.eye(shape[0], dtype=torch.float32, device="cpu"),
        ),
    ),
)

_T5_BLOCK = "encoder.block.{i}.layer"

T5 = Layout(
    rules=(
        *renamed(
            ("embedding.{leaf}", "shared.{leaf}"),
            ("relative_bias.{leaf}", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.{leaf}"),
            ("blocks.{i}.norm1.{leaf}", _T5_BLOCK + ".0.layer_norm.{leaf}"),
            ("blocks.{i}.attention.out.{leaf}", _T5_BLOCK + ".0.SelfAttention.o.{leaf}"),
            ("blocks.{i}.norm2.{leaf}", _T5_BLOCK + ".1.layer_norm.{leaf}"),
            ("blocks.{i}.mlp.out.{leaf}", _T5_BLOCK + ".1.DenseReluDense.wo.{leaf}"),
            ("final_norm.{leaf}", "encoder.final_layer_norm.{leaf}"),
        ),
        _qkv("blocks.{i}.attention.qkv.{leaf}", _T5_BLOCK + ".0.SelfAttention", ("q", "k", "v")),
        Rule("blocks.{i}.mlp.in.{leaf}", tuple(f"{_T5_BLOCK}.1.DenseReluDense.wi_{n}.{{leaf}}" for n in (0, 1)), FUSE),
    ),
    # One table under two names; files have either or both.
    aliases=(("encoder.embed_tokens.{leaf}", "shared.{leaf}"),),
)
