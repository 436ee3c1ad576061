"""Kinds of files that are given as LoRAs of SD3 and are none, recognised by the names of their tensors."""

import re
from collections.abc import Mapping

from functional_sd3.lora import keys as lora_keys

_SIGNS = (
    (r"^(train\.)?optimizer\.", "a checkpoint of `train` or `reward`, which --resume goes on from; a LoRA that a run "
     "has trained is in its --out folder when it has ended (--lora OUT), a model too (--params OUT); with "
     "--result-every on the way too, in OUT/results"),
    (r"\.(absmax|quant_state\.\S+|nested_absmax|SCB|weight_format)$", "weights quantized by bitsandbytes, not a LoRA"),
    (r"(^|[._])(single_transformer_blocks|double_blocks|single_blocks)[._]\d",
     "a LoRA of Flux (or of another model with double and single blocks), not of SD3"),
    (r"(^|[._])transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)", "a LoRA of Qwen-Image, not of SD3"),
    (r"(^|[._])blocks[._]\d+[._](cross_attn|self_attn|ffn)[._]", "a LoRA of Wan, not of SD3"),
    (r"(^|[._])(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]", "a LoRA of a U-Net"),
    (r"(^|[._])lora_te[._]text_model", "a LoRA of Stable Diffusion 1 or 2, not of SD3"),
    (r"^(clip_l|clip_g|t5|t5xxl|emb_params|string_to_param.*|<.*>)$", "a textual inversion: give it with --embedding"),
    (r"(^|\.)(controlnet_blocks|pos_embed_input|controlnet_x_embedder)[._]", "a ControlNet: give it with --controlnet"),
    (r"(^|\.)(image_proj|ip_adapter)\.", "an IP-Adapter, not a LoRA"),
)  # fmt: skip
_MAX_NAME = 1000
_UNETS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}
"""Width of the text that a U-Net's cross-attention reads -> the model."""
_MODEL = re.compile(r"(^|\.)(transformer_blocks|joint_blocks|blocks|encoder\.layers|encoder\.block)\.\d+\..*\.weight$")


def described(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Type of a file of tensors (name -> shape), as the end of a sentence; None if it is unknown."""
    shapes = {name: shape for name, shape in shapes.items() if len(name) <= _MAX_NAME}
    for pattern, what in _SIGNS:
        if any(re.search(pattern, name) for name in shapes):
            return f"it is {_unet(shapes) or what}" if what.endswith("U-Net") else f"it is {what}"
    if kind := next((kind for name in shapes if (kind := lora_keys.refused(name))), None):
        return f"it holds {kind}, which is not supported"
    has_roles = any(lora_keys.parse(name).role for name in shapes)
    if not has_roles and any(_MODEL.search(name) for name in shapes):
        return "it holds whole weights, not a LoRA: give it with --params, or make one with `lora extract`"
    return None


def extra(key: str) -> str | None:
    """Description of a key that LoRA files hold beside their layers; None for all other keys."""
    if key.startswith(("bundle_emb.", "bundle_emb_")):
        return "an embedding that was trained with the LoRA (OneTrainer): it is no part of it"
    return None


def _unet(shapes: Mapping[str, tuple[int, ...]]) -> str:
    for name, shape in shapes.items():
        if re.search(r"attn2[._]to_[kv]\b.*(down|lora_A)|attn2_to_[kv]\.lora_down", name) and len(shape) > 1:
            if model := _UNETS.get(shape[1]):
                return f"a LoRA of {model} (a U-Net), not of SD3"
    return "a LoRA of a U-Net (Stable Diffusion 1, 2 or SDXL), not of SD3"
