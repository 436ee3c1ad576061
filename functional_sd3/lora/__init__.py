"""LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models") as trees beside the parameters.

    style = lora.load("style.safetensors", model.config)
    params = lora.apply(model.params, style, 0.8)

A Lora (described in `lora.tree`) is a tree of its own: it is applied to parameters, trained, vmapped over,
merged, extracted and saved without the base ever being written to. All functions here but `load` and `save` are pure.
"""

from functional_sd3.lora.algebra import combine, extract, resize
from functional_sd3.lora.apply import ATTENTION, Merged, Scale, apply, init, merge, spec, unmerge
from functional_sd3.lora.read import Layer, Loaded, layers, load, load_with_report, summary
from functional_sd3.lora.tree import Lora, LoraEntry
from functional_sd3.lora.write import save

__all__ = [
    "ATTENTION",
    "Layer",
    "Loaded",
    "Lora",
    "LoraEntry",
    "Merged",
    "Scale",
    "apply",
    "combine",
    "extract",
    "init",
    "layers",
    "load",
    "load_with_report",
    "merge",
    "resize",
    "save",
    "spec",
    "summary",
    "unmerge",
]
