"""What people give as a LoRA of SD3 and is something else is named in one sentence."""

import pytest
import torch
from safetensors.torch import save_file

from functional_sd3 import lora, weights
from functional_sd3.weights import WeightsError
from tests.weights.conftest import CONFIG


def pair(layer, inputs=4, kohya=True):
    down, up = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    return {f"{layer}.{down}.weight": torch.ones(2, inputs), f"{layer}.{up}.weight": torch.ones(4, 2)}


FILES = {
    "Flux, kohya": (pair("lora_unet_double_blocks_0_img_attn_qkv"), "a LoRA of Flux"),
    "Flux, diffusers": (pair("transformer.single_transformer_blocks.3.attn.to_q", kohya=False), "a LoRA of Flux"),
    "Flux, both": (
        pair("transformer.transformer_blocks.0.attn.to_q", 8, False)
        | pair("transformer.single_transformer_blocks.0.attn.to_q", kohya=False), "a LoRA of Flux",
    ),
    "Qwen-Image": (pair("transformer.transformer_blocks.0.img_mlp.net.2", kohya=False), "a LoRA of Qwen-Image"),
    "Wan": (pair("diffusion_model.blocks.0.cross_attn.q", kohya=False), "a LoRA of Wan"),
    "SDXL": (
        pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 2048),
        "a LoRA of SDXL (a U-Net), not of SD3",
    ),
    "SD1.5": (
        pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 768),
        "a LoRA of Stable Diffusion 1 (a U-Net)",
    ),
    "SD1.5, diffusers": (
        pair("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", kohya=False), "a LoRA of a U-Net",
    ),
    "bitsandbytes": (
        {"transformer_blocks.0.attn.to_q.weight": torch.ones(8, 1), "transformer_blocks.0.attn.to_q.weight.absmax":
         torch.ones(2)}, "weights quantized by bitsandbytes",
    ),
    "a checkpoint": ({"transformer_blocks.0.attn.to_q.weight": torch.ones(8, 8)}, "whole weights, not a LoRA"),
    "a textual inversion": ({"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 24)}, "give it with --embedding"),
    "an IP-Adapter": ({"image_proj.proj_in.weight": torch.ones(2, 2)}, "an IP-Adapter"),
    "OFT": ({"transformer.transformer_blocks.0.attn.to_q.oft_blocks": torch.ones(2, 4, 4)}, "part of an OFT"),
    "nothing": ({}, "it is empty"),
    "something": ({"weight": torch.ones(2)}, "weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_lora_of_sd3_is_named(tmp_path, name):
    tensors, said = FILES[name]
    save_file(tensors, tmp_path / "a.safetensors")
    for strict in (True, False):
        if strict or name != "Flux, both":
            with pytest.raises(WeightsError) as caught:
                lora.load(tmp_path / "a.safetensors", CONFIG, strict=strict)
            assert len(caught.value.problems) == 1 and said in str(caught.value)


def test_kinds_without_a_formula_are_named_whatever_reads_them(tmp_path):
    save_file(FILES["OFT"][0], tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="holds no LoRA: it holds part of an OFT or BOFT, which is not supported"):
        lora.layers(tmp_path / "a.safetensors")


def test_a_whole_checkpoint_that_was_saved_here_is_named(tmp_path, make_model):
    model = make_model()
    for layout in ("stability", "native", "single"):
        weights.save(tmp_path / f"{layout}.safetensors", model, layout=layout)
        with pytest.raises(WeightsError, match="whole weights, not a LoRA: give it with --params"):
            lora.load(tmp_path / f"{layout}.safetensors", CONFIG)
        with pytest.raises(WeightsError, match="holds no LoRA: it holds whole weights"):
            lora.layers(tmp_path / f"{layout}.safetensors")


def test_a_component_that_the_model_lacks_is_named_or_left_out_with_a_report(tmp_path):
    from dataclasses import replace

    tensors = pair("lora_te3_encoder_block_1_layer_0_SelfAttention_o", 8)
    tensors = {name: torch.ones(2, 8) if "down" in name else torch.ones(16, 2) for name in tensors}
    tensors |= {f"lora_unet_joint_blocks_1_x_block_attn_proj.lora_{side}.weight": value for side, value in
                {"down": torch.ones(2, 16), "up": torch.ones(16, 2)}.items()}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    lora.load(tmp_path / "a.safetensors", CONFIG)
    without = replace(CONFIG, t5=None)
    with pytest.raises(WeightsError, match="lora_te3.* adapts t5, which this model lacks"):
        lora.load(tmp_path / "a.safetensors", without)
    loaded = lora.load_with_report(tmp_path / "a.safetensors", without, allow_absent=True)
    assert len(loaded.left_out) == 2 and all("lora_te3" in key for key in loaded.left_out)


def test_an_embedding_trained_with_a_lora_is_named(tmp_path):
    tensors = pair("transformer.joint_blocks.1.x_block.attn.proj", 16) | {"bundle_emb.word.clip_l": torch.ones(1, 16)}
    tensors["transformer.joint_blocks.1.x_block.attn.proj.lora_up.weight"] = torch.ones(16, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="bundle_emb.word.clip_l is an embedding that was trained with the LoRA"):
        lora.load(tmp_path / "a.safetensors", CONFIG)
    loaded = lora.load_with_report(tmp_path / "a.safetensors", CONFIG, allow_absent=True)
    assert loaded.left_out == ("bundle_emb.word.clip_l",)
