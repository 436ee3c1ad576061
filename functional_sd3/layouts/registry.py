"""Every format of a component's tensors, and which of them a file holds, by the names inside the file."""

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any

from functional_sd3.formats.errors import WeightsError
from functional_sd3.layouts import diffusers_configs as configs
from functional_sd3.layouts import diffusers_keys, infer, native, rules, stability, taesd
from functional_sd3.layouts.components import SPECS, Config
from functional_sd3.layouts.format import Format
from functional_sd3.layouts.infer import Shapes
from functional_sd3.layouts.rules import Layout

CLIPS = ("clip_l", "clip_g")


def _format(
    owner: str,
    component: str,
    prefix: str,
    sign: str,
    names: Layout,
    read: Callable[[Shapes, bool], Any],
    sized: Callable[[Any], Layout] | None = None,
) -> Format:
    """A row of a component. read: the config from shapes by our own paths; by theirs where `names` has no rules."""
    spec = SPECS["clip_l" if component == "clip" else component]
    by_path = partial(rules.read_backwards, names) if names.rules else dict
    table = configs.TABLES[component]
    return Format(owner, component, prefix, sign, spec, names, lambda s, ones: read(by_path(s), ones), table, sized)


_JOINT, _BLOCKS = r"joint_blocks\.\d+\.", r"transformer_blocks\.\d+\."
_LDM_VAE, _VAE = (
    r"(encoder\.down|decoder\.up|(en|de)coder\.mid)\.",
    r"(encoder\.down|decoder\.up|(en|de)coder\.mid)_block",
)
_CLIP, _T5 = r"(text_model\.)?encoder\.layers\.\d+\.(self_attn|mlp|layer_norm)", r"encoder\.block\.\d+\."
_INFER = {
    "clip_l": infer.clip,
    "clip_g": infer.clip,
    "t5": infer.t5,
    "transformer": infer.transformer,
    "vae": infer.vae,
}


def _taesd(owner: str, prefix: str, sign: str, naming: taesd.Naming) -> Format:
    sized, read = partial(taesd.layout, naming), partial(taesd.infer, naming)
    return _format(owner, "taesd", prefix, sign, Layout(()), read, sized)


TAESD_HALF = _taesd("the author", "", r"\d+\.conv\.\d+\.(weight|bias)$", taesd.ORIGINAL)
"""One of two files; `weights.discover` joins them to what `TAESD_WHOLE` reads."""
TAESD_WHOLE = _taesd("ComfyUI", "", r"taesd_(en|de)coder\.\d+\.", taesd.ORIGINAL)
DIFFUSERS = {
    "clip_l": _format("transformers", "clip", "", _CLIP, diffusers_keys.CLIP, infer.clip),
    "t5": _format("transformers", "t5", "", _T5, diffusers_keys.T5, infer.t5),
    "transformer": _format("diffusers", "transformer", "", _BLOCKS, diffusers_keys.TRANSFORMER, infer.transformer),
    "vae": _format("diffusers", "vae", "", _VAE, diffusers_keys.VAE, infer.vae),
    "taesd": _taesd("diffusers", "", r"(en|de)coder\.layers\.\d+\.(conv\.\d+\.)?(weight|bias)$", taesd.DIFFUSERS),
}
DIFFUSERS["clip_g"] = DIFFUSERS["clip_l"]


def _stability_transformer(prefix: str) -> Format:
    return _format("Stability", "transformer", prefix, _JOINT, stability.TRANSFORMER, infer.transformer)


def _stability_vae(prefix: str) -> Format:
    # The order of the decoder's levels makes no difference to what is inferred.
    return _format(
        "Stability",
        "vae",
        prefix,
        _LDM_VAE,
        stability.vae(16),
        infer.vae,
        lambda config: stability.vae(len(config.channels)),
    )


STABILITY = {
    "clip_l": _format("Stability", "clip_l", stability.ENCODER_PREFIXES["clip_l"], _CLIP, stability.CLIP, infer.clip),
    "clip_g": _format("Stability", "clip_g", stability.ENCODER_PREFIXES["clip_g"], _CLIP, stability.CLIP, infer.clip),
    "t5": _format("Stability", "t5", stability.ENCODER_PREFIXES["t5"], _T5, stability.T5, infer.t5),
    "transformer": _stability_transformer(stability.TRANSFORMER_PREFIX),
    "vae": _stability_vae(stability.VAE_PREFIX),
    "taesd": TAESD_WHOLE,
}
NATIVE = {
    name: _format("functional_sd3", name, f"{name}.", native.SIGNS[name], native.LAYOUT, read)
    for name, read in _INFER.items()
}
NATIVE_1 = _format(
    "functional_sd3", "transformer", "transformer.", native.SIGNS["transformer"], native.VERSION_1, infer.transformer
)
"""The transformer in files of version 1."""
NATIVE["taesd"] = _format("functional_sd3", "taesd", "taesd.", native.SIGNS["taesd"], native.LAYOUT, native.taesd)
BARE = {
    "t5": _format("Stability", "t5", "", _T5, stability.T5, infer.t5),
    "transformer": _stability_transformer(""),
    "vae": _stability_vae(""),
}
FORMATS = (
    *STABILITY.values(),
    *NATIVE.values(),
    # ComfyUI takes diffusers' names below Stability's prefixes too.
    _format(
        "diffusers", "transformer", stability.TRANSFORMER_PREFIX, _BLOCKS, diffusers_keys.TRANSFORMER, infer.transformer
    ),
    _format("diffusers", "vae", stability.VAE_PREFIX, _VAE, diffusers_keys.VAE, infer.vae),
    BARE["transformer"],
    BARE["vae"],
    *(DIFFUSERS[name] for name in ("clip_l", "t5", "transformer", "vae", "taesd")),
    TAESD_HALF,
)

# Beside the components of a checkpoint, and nothing to load.
_IGNORED = re.compile(r"(.*\.)?(logit_scale|scaled_fp8)|model_ema\.(decay|num_updates)")
_TRAINING_STATE = (
    (
        r"(train\.)?optimizer\.",
        "a checkpoint of `train` or `reward`, which --resume goes on from; what a run has trained is in its --out "
        "folder when it has ended (with --result-every on the way, in OUT/results): a model (--params OUT) or "
        "pytorch_lora_weights.safetensors (--lora OUT)",
    ),
    (r"latents$", "the encoded images of a training run, which --resume reads"),
)
_FOREIGN = (
    *_TRAINING_STATE,
    (r"crc$", "a shard of a training set that `cache` encoded, which `train --data CACHE` reads"),
    (
        r".*\.(weight\.)?(quant_state\.bitsandbytes__\w+|absmax|quant_map|nested_absmax|SCB)$",
        "quantized by bitsandbytes (nf4 or int8), which is not read: give the model it was made from; "
        "`quantize` makes small weights of that",
    ),
    (r"(.*\.)?controlnet_blocks\.\d+\.", "a ControlNet, which weights.load_controlnet reads (--controlnet)"),
    (
        r".*(\.lora_(A|B|up|down)(\.|$)|(\.|_)lora(_linear_layer)?\.(up|down)\.|\.(lokr|hada)_\w+$|\.(diff|diff_b|w_norm)$)",
        "a LoRA, which lora.load reads (--lora)",
    ),
    (r"(.*\.)?(double_blocks|single_transformer_blocks)\.\d+\.", "a Flux model"),
    (r"conditioner\.embedders\.\d+\.", "a checkpoint of Stable Diffusion XL"),
    (r"cond_stage_model\.", "a checkpoint of Stable Diffusion 1 or 2"),
    (
        r"(.*\.)?(down|up)_blocks\.\d+\.(resnets\.\d+\.time_emb_proj|attentions\.\d+\.transformer_blocks)\.",
        "a U-Net of Stable Diffusion 1, 2 or XL",
    ),
    (r"(.*\.)?(input|output)_blocks\.\d+\.", "a U-Net of Stable Diffusion 1, 2 or XL"),
    (r"(image_proj|ip_adapter)\.", "an IP-Adapter, which weights.load_ip_adapter reads"),
    (r"(clip_l|clip_g|t5xxl)$", "a textual inversion, which weights.load_inversion reads (--embedding)"),
)


class ForeignWeights(WeightsError):
    """Weights that are whole, but of another model than SD3 and of no addition to it."""


class TrainingState(ForeignWeights):
    """A file of the checkpoints/ folder of a training run."""


def foreign_kind(names: Collection[str]) -> str | None:
    """Type of a file with these names if it holds something else than components of a model, else None."""
    return next((what for pattern, what in _FOREIGN if any(re.match(pattern, name) for name in names)), None)


def recognise(names: Collection[str]) -> dict[Format, list[str]]:
    """The forms in a file -> their names. Raises WeightsError for a file of none, of what is something else, or with
    names that belong to nothing."""
    if what := foreign_kind(names):
        kind = TrainingState if what in dict(_TRAINING_STATE).values() else ForeignWeights
        raise kind(f"is {what}; a model of SD3 is needed here")
    present = [format for format in FORMATS if any(format.has(name) for name in names)]
    for prefix in {format.prefix for format in present}:
        signs = [next(name for name in names if format.has(name)) for format in present if format.prefix == prefix]
        if len(signs) > 1:
            raise WeightsError(f"mixes tensors of several layouts, {' and '.join(signs)}")
    names_by_format: dict[Format, list[str]] = {format: [] for format in present}
    lost = []
    for name in names:
        owner = max(
            (format for format in present if name.startswith(format.prefix)), key=lambda f: len(f.prefix), default=None
        )
        if owner:
            names_by_format[owner].append(name)
        elif not _IGNORED.fullmatch(name):
            lost.append(name)
    if not present:
        raise ForeignWeights(f"is nothing known of SD3: {len(names)} tensors such as {', '.join(list(names)[:3])}")
    if lost:
        raise WeightsError([f"{name} is unexpected" for name in lost])
    return names_by_format


def infer_config(shapes: Shapes) -> Config:
    """The configs of every component among tensors (name -> shape) of any layout, read off names and shapes alone.

    SD3-medium, 3.5-medium, 3.5-large and any depth, width, dual attention and table of positions in between; the text
    encoders, the VAE and TAESD. Sizes that shapes do not determine are those of the released models (`layouts.infer`).
    A stand-alone CLIP is G where it is as large as G, else L. Raises WeightsError for tensors of no known layout, and
    naming the one without which the sizes cannot be read.
    """
    configs: dict[str, Any] = {}
    for format, names in recognise(shapes).items():
        config = format.config({name: shapes[name] for name in names})
        name = clip_named(config) if format.component == "clip" else format.component
        configs[name] = activated(name, config)
    return Config(**configs)


def clip_named(config: Any) -> str:
    """Name of a stand-alone CLIP among SD3's two: G is the larger by far."""
    return "clip_g" if config.width >= 1280 or config.layers >= 32 else "clip_l"


def activated(name: str, config: Any) -> Any:
    """A config with the activation that SD3's CLIP of this name has."""
    return replace(config, activation="gelu" if name == "clip_g" else "quick_gelu") if name in CLIPS else config
