"""IP-Adapters in files: the names and shapes of InstantX's `ip-adapter.safetensors` for SD3.5-large."""

from functional_sd3.formats.errors import WeightsError
from functional_sd3.layouts.format import Format
from functional_sd3.layouts.infer import Shapes, numbers, with_leading_ones
from functional_sd3.layouts.rules import Layout, renamed
from functional_sd3.transformer import ip_adapter

_PROJ, _BLOCK, _THEIRS = "image_proj.", "resampler.blocks.{i}", "image_proj.layers.{i}"
_OURS, _ATTENTION = "attentions.{i}", "ip_adapter.{i}"
INSTANTX = Layout(
    renamed(
        ("resampler.queries", _PROJ + "latents"),
        ("resampler.in.{leaf}", _PROJ + "proj_in.{leaf}"),
        ("resampler.time.in.{leaf}", _PROJ + "time_embedding.linear_1.{leaf}"),
        ("resampler.time.out.{leaf}", _PROJ + "time_embedding.linear_2.{leaf}"),
        ("resampler.out.{leaf}", _PROJ + "proj_out.{leaf}"),
        ("resampler.norm.{leaf}", _PROJ + "norm_out.{leaf}"),
        (_BLOCK + ".image_norm.{leaf}", _THEIRS + ".0.norm1.{leaf}"),
        (_BLOCK + ".token_norm.{leaf}", _THEIRS + ".0.norm2.{leaf}"),
        (_BLOCK + ".query.{leaf}", _THEIRS + ".0.to_q.{leaf}"),
        (_BLOCK + ".key_value.{leaf}", _THEIRS + ".0.to_kv.{leaf}"),
        (_BLOCK + ".out.{leaf}", _THEIRS + ".0.to_out.{leaf}"),
        (_BLOCK + ".mlp_norm.{leaf}", _THEIRS + ".1.0.{leaf}"),
        (_BLOCK + ".mlp.in.{leaf}", _THEIRS + ".1.1.{leaf}"),
        (_BLOCK + ".mlp.out.{leaf}", _THEIRS + ".1.3.{leaf}"),
        (_BLOCK + ".modulation.{leaf}", _THEIRS + ".2.1.{leaf}"),
        (_OURS + ".modulation.{leaf}", _ATTENTION + ".norm_ip.linear.{leaf}"),
        (_OURS + ".key.{leaf}", _ATTENTION + ".to_k_ip.{leaf}"),
        (_OURS + ".value.{leaf}", _ATTENTION + ".to_v_ip.{leaf}"),
        (_OURS + ".query_norm.{leaf}", _ATTENTION + ".norm_q.{leaf}"),
        (_OURS + ".key_norm.{leaf}", _ATTENTION + ".norm_k.{leaf}"),
        (_OURS + ".prompt_key_norm.{leaf}", _ATTENTION + ".norm_ip_k.{leaf}"),
    ),
    # As diffusers calls the same in its own modules.
    aliases=tuple(
        (f"{_THEIRS}.{alias}.{{leaf}}", f"{_THEIRS}.{proper}.{{leaf}}")
        for alias, proper in (
            ("ln0", "0.norm1"),
            ("ln1", "0.norm2"),
            ("attn.to_q", "0.to_q"),
            ("attn.to_kv", "0.to_kv"),
            ("attn.to_out.0", "0.to_out"),
            ("adaln_norm", "1.0"),
            ("ff.net.0.proj", "1.1"),
            ("ff.net.2", "1.3"),
            ("adaln_proj", "2.1"),
        )
    ),
)
_HEAD_DIM = 64


def infer(shapes: Shapes, drops_ones: bool = False) -> ip_adapter.Config:
    """The config that tensors of these names and shapes belong to; the resampler's heads have 64 channels.

    Raises WeightsError when it is no IP-Adapter of SD3.5.
    """
    shapes = with_leading_ones(shapes, _DIMENSIONS, drops_ones)
    problems = [
        f"{name} is {'missing' if name not in shapes else f'of shape {list(shapes[name])}'}: "
        "this is not an IP-Adapter of SD3.5"
        for name, count in _DIMENSIONS.items()
        if len(shapes.get(name, ())) != count or 0 in shapes[name]
    ]
    if problems:
        raise WeightsError(problems)
    hidden, image = shapes[_PROJ + "proj_in.weight"]
    inner = shapes[_PROJ + "layers.0.0.to_q.weight"][0]
    resampler_head_dim = _HEAD_DIM if inner % _HEAD_DIM == 0 else inner
    return ip_adapter.Config(
        attentions=len(numbers(r"ip_adapter\.(\d+)\.to_k_ip\.weight", shapes)),
        width=shapes[_PROJ + "proj_out.weight"][0],
        head_dim=shapes["ip_adapter.0.norm_q.weight"][0],
        image_width=image,
        hidden_width=hidden,
        depth=len(numbers(r"image_proj\.layers\.(\d+)\.0\.to_q\.weight", shapes)),
        heads=inner // resampler_head_dim,
        resampler_head_dim=resampler_head_dim,
        tokens=shapes[_PROJ + "latents"][1],
        mlp_width=shapes[_PROJ + "layers.0.1.1.weight"][0],
        time_frequencies=shapes[_PROJ + "time_embedding.linear_1.weight"][1],
    )


# The tensors whose shapes the config is read off, and their numbers of dimensions.
_DIMENSIONS = {
    _PROJ + "proj_in.weight": 2,
    _PROJ + "proj_out.weight": 2,
    _PROJ + "latents": 3,
    _PROJ + "time_embedding.linear_1.weight": 2,
    _PROJ + "layers.0.0.to_q.weight": 2,
    _PROJ + "layers.0.1.1.weight": 2,
    "ip_adapter.0.norm_q.weight": 1,
}

FORMAT = Format("InstantX", "IP-Adapter", "", r"(image_proj|ip_adapter)\.", ip_adapter.spec, INSTANTX, infer)
