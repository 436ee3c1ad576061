"""Identify what a folder of weights is of by the names of its files."""

from pathlib import Path

LORAS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Names of a LoRA's file in a folder, diffusers' and PEFT's."""
WORD = "learned_embeds.safetensors"
"""Name of a textual inversion's file in a folder, that of diffusers' scripts."""
_KINDS = (
    ("model_index.json", "a whole model (--params)"),
    *((name, "a LoRA (--lora)") for name in LORAS),
    (WORD, "a textual inversion (--embedding)"),
    ("step-*", "checkpoints of a training run, which its --resume reads"),
    ("config.json", "a ControlNet (--controlnet) or a component of a model (--params)"),
)


def described(folder: Path) -> str:
    """The kind of a folder that was given as another, as the end of a sentence; "" if it is unknown."""
    kind = next((kind for pattern, kind in _KINDS if any(folder.glob(pattern))), None)
    return f": it holds {kind}" if kind else ""
