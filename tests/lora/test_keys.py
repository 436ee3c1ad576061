"""Every prefix x every spelling of layers x every spelling of factors: all load, and mean what merging by hand does."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from functional_sd3 import lora
from functional_sd3.core import tree
from functional_sd3.lora import keys as lora_keys
from functional_sd3.lora import tree as adapters
from functional_sd3.weights import WeightsError
from tests.weights.conftest import CONFIG

# Written down here once more, from the trainers' sources, so that a slip in the tables shows.
PREFIXES = {
    "transformer": (
        "transformer.", "diffusion_model.", "model.diffusion_model.", "unet.", "base_model.model.", "",
        "transformer.base_model.model.", "base_model.model.transformer.", "lora_transformer.", "lora_transformer_",
        "lora_unet_", "lora_unet.", "lycoris_", "lycoris_transformer_", "transformer.module.", "module.transformer.",
        "transformer._orig_mod.", "lora_diffusion_model_",
    ),
    "clip_l": (
        "text_encoder.", "lora_te1_", "lora_te1.", "clip_l.", "text_encoders.clip_l.transformer.", "lora_clip_l_",
        "text_encoder.base_model.model.", "clip_l.transformer.", "lora_text_encoder_", "lycoris_te1_",
    ),
    "clip_g": (
        "text_encoder_2.", "lora_te2_", "lora_te2.", "clip_g.", "text_encoders.clip_g.transformer.", "lora_clip_g_",
        "text_encoder_2.base_model.model.", "clip_g.transformer.", "lora_text_encoder_2_",
    ),
    "t5": (
        "text_encoder_3.", "lora_te3_", "lora_te3.", "t5.", "t5xxl.", "text_encoders.t5xxl.transformer.",
        "text_encoder_3.base_model.model.", "t5xxl.transformer.", "lora_t5xxl_",
    ),
}  # fmt: skip
TRANSFORMER = {
    # ours, part of parts: diffusers' names; Stability's
    ("blocks.1.image.attention.qkv", 0, 3): ("transformer_blocks.1.attn.to_q", "joint_blocks.1.x_block.attn.qkv.0"),
    ("blocks.1.image.attention2.qkv", 2, 3): ("transformer_blocks.1.attn2.to_v", "joint_blocks.1.x_block.attn2.qkv.2"),
    ("blocks.1.context.attention.qkv", 1, 3): (
        "transformer_blocks.1.attn.add_k_proj", "joint_blocks.1.context_block.attn.qkv.1",
    ),
    ("blocks.1.image.attention.out", 0, 1): (
        "transformer_blocks.1.attn.to_out.0", "transformer_blocks.1.attn.to_out", "joint_blocks.1.x_block.attn.proj",
    ),
    ("blocks.1.context.attention.out", 0, 1): (
        "transformer_blocks.1.attn.to_add_out", "joint_blocks.1.context_block.attn.proj",
    ),
    ("blocks.1.image.mlp.in", 0, 1): ("transformer_blocks.1.ff.net.0.proj", "joint_blocks.1.x_block.mlp.fc1"),
    ("blocks.1.context.mlp.out", 0, 1): (
        "transformer_blocks.1.ff_context.net.2", "joint_blocks.1.context_block.mlp.fc2",
    ),
    ("blocks.1.image.modulation", 0, 1): (
        "transformer_blocks.1.norm1.linear", "joint_blocks.1.x_block.adaLN_modulation.1",
    ),
    ("blocks.1.context.modulation", 0, 1): (
        "transformer_blocks.1.norm1_context.linear", "joint_blocks.1.context_block.adaLN_modulation.1",
    ),
    ("time.in", 0, 1): ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("pooled.out", 0, 1): ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
    ("context", 0, 1): ("context_embedder",),
    ("patch", 0, 1): ("pos_embed.proj", "x_embedder.proj"),
    ("final.out", 0, 1): ("proj_out", "final_layer.linear"),
}  # fmt: skip
SWAPPED = {
    "blocks.2.context.modulation": (
        "transformer_blocks.2.norm1_context.linear", "joint_blocks.2.context_block.adaLN_modulation.1",
    ),
    "final.modulation": ("norm_out.linear", "final_layer.adaLN_modulation.1"),
}  # fmt: skip
"""Ours: diffusers' name, whose two halves are the other way round; Stability's."""
CLIP = {
    ("blocks.1.attention.qkv", 1, 3): (
        "text_model.encoder.layers.1.self_attn.k_proj", "encoder.layers.1.self_attn.k_proj",
        "text_model.encoder.layers.1.self_attn.to_k",
    ),
    ("blocks.1.attention.out", 0, 1): (
        "text_model.encoder.layers.1.self_attn.out_proj", "text_model.encoder.layers.1.self_attn.to_out",
    ),
    ("blocks.1.mlp.in", 0, 1): ("text_model.encoder.layers.1.mlp.fc1",),
    ("projection", 0, 1): ("text_projection",),
}  # fmt: skip
T5 = {
    ("blocks.1.attention.qkv", 2, 3): ("encoder.block.1.layer.0.SelfAttention.v",),
    ("blocks.1.mlp.in", 1, 2): ("encoder.block.1.layer.1.DenseReluDense.wi_1",),
    ("blocks.0.mlp.out", 0, 1): ("encoder.block.0.layer.1.DenseReluDense.wo",),
}
LAYERS = {"transformer": TRANSFORMER, "clip_l": CLIP, "clip_g": CLIP, "t5": T5}
FACTORS = (
    (".lora_A.weight", ".lora_B.weight"), (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A.default_0.weight", ".lora_B.default_0.weight"), (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"), (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"), (".down.weight", ".up.weight"), (".lora_A", ".lora_B"),
)  # fmt: skip
SHAPES = lora_keys.leaf_shapes(CONFIG)


def spelled(component: str):
    """(our path, part, parts, layer) of all spellings, with dots, with underscores, and as attention processors."""
    layers = [(*ours, name) for ours, names in LAYERS[component].items() for name in names]
    for (path, part, parts, name), prefix in itertools.product(layers, PREFIXES[component]):
        for layer in {name, name.replace(".", "_"), name.replace(".attn.to_", ".attn.processor.to_")}:
            yield f"{component}.{path}.weight", part, parts, prefix + layer


@pytest.mark.parametrize("component", LAYERS)
def test_the_whole_product_of_prefixes_layers_and_factors_means_what_is_merged_by_hand(tmp_path, component):
    generator = torch.Generator().manual_seed(5)
    table = lora_keys.table(CONFIG)
    count = 0
    for (path, part, parts, layer), factors in itertools.product(spelled(component), FACTORS):
        target = table.find(layer)[1].weight
        assert (target.path, target.part, target.parts, target.transform.name) == (path, part, parts, "identity"), layer
        keys = [layer + suffix for suffix in factors]
        assert [lora_keys.parse(key) for key in keys] == [(layer, "down"), (layer, "up")]
        count += 1
    assert count > 400
    # The same names through files: of every layer one spelling after another, the values compared.
    file = tmp_path / "lora.safetensors"
    chosen = list(itertools.product(spelled(component), FACTORS))[:: 1 + count // 40]
    for (path, part, parts, layer), factors in chosen:
        rows, *rest = SHAPES[path]
        down, up = torch.randn(2, *rest, generator=generator), torch.randn(rows // parts, 2, generator=generator)
        # The alpha of one is 3, and its rank 2.
        save_file({layer + factors[0]: down, layer + factors[1]: up, layer + ".alpha": torch.tensor(3.0)}, file)
        expected = torch.zeros(rows, *rest)
        expected.chunk(parts)[part].copy_((1.5 * up @ down.flatten(1)).reshape(rows // parts, *rest))
        assert_adds(file, path, expected)


def assert_adds(file, path, expected):
    params = {path.partition(".")[0]: skeleton(path, expected)}
    added = tree.flatten_paths(lora.apply(params, lora.load(file, CONFIG)))
    torch.testing.assert_close(added.pop(path), expected, rtol=1e-5, atol=1e-5)


def skeleton(path, like):
    """A tree whose one leaf at `path` is zero."""
    node = torch.zeros_like(like)
    for name in reversed(path.split(".")[1:]):
        node = [{}] * int(name) + [node] if name.isdecimal() else {name: node}
    return node


@pytest.mark.parametrize("place", SWAPPED)
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "diff", "bias", "dora"])
def test_halves_are_swapped_where_diffusers_are_whatever_the_kind(tmp_path, place, kind):
    generator = torch.Generator().manual_seed(6)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    path = f"transformer.{place}.{'bias' if kind == 'bias' else 'weight'}"
    rows, inputs = SHAPES[f"transformer.{place}.weight"]
    tensors = {
        "lora": {".lora_down.weight": draw(2, inputs), ".lora_up.weight": draw(rows, 2)},
        "loha": {".hada_w1_a": draw(rows, 2), ".hada_w1_b": draw(2, inputs), ".hada_w2_a": draw(rows, 2),
                 ".hada_w2_b": draw(2, inputs)},
        "lokr": {".lokr_w1": draw(4, 4), ".lokr_w2": draw(rows // 4, inputs // 4)},
        "diff": {".diff": draw(rows, inputs)},
        "bias": {".diff_b": draw(rows)},
        "dora": {".lora_A.weight": draw(2, inputs), ".lora_B.weight": draw(rows, 2), ".dora_scale": draw(rows, 1)},
    }[kind]  # fmt: skip
    swap = lambda value: torch.cat(value.chunk(2)[::-1])  # noqa: E731
    results = []
    weight = draw(rows, inputs) if kind != "bias" else draw(rows)
    same = lambda value: value  # noqa: E731
    for name, prefix, rearrange in zip(SWAPPED[place], ("transformer.", "lora_unet_"), (swap, same), strict=True):
        name = name if prefix.endswith(".") else name.replace(".", "_")
        file = tmp_path / "lora.safetensors"
        save_file({prefix + name + suffix: value for suffix, value in tensors.items()}, file)
        node = adapters.entries(lora.load(file, CONFIG))[path]
        # Diffusers' file is for diffusers' weight, so it changes that weight as ours changes ours.
        results.append(rearrange(adapters.change(node, rearrange(weight))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[0], swap(results[0]))


def test_kohyas_split_query_key_and_value(tmp_path):
    generator = torch.Generator().manual_seed(7)
    layer, path = "lora_unet_joint_blocks_1_x_block_attn_qkv", "transformer.blocks.1.image.attention.qkv.weight"
    downs, ups = torch.randn(3, 2, 16, generator=generator), torch.randn(3, 16, 2, generator=generator)
    tensors = {f"{layer}.lora_down.{part}.weight": downs[part].clone() for part in range(3)}
    tensors |= {f"{layer}.lora_up.{part}.weight": ups[part].clone() for part in range(3)}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_adds(tmp_path / "lora.safetensors", path, (ups @ downs).flatten(0, 1))


def test_no_spelling_of_a_layer_is_that_of_another():
    """Flattening dots may not make two layers one, nor may a prefix and a layer be read as another prefix's."""
    table = lora_keys.table(CONFIG)
    for component, modules in table.components.items():
        for name, module in modules.items():
            for prefix in lora_keys.prefixes(component):
                assert table.find(f"{prefix}.{name}".lstrip(".")) == (component, module), (prefix, name)


def test_every_weight_and_bias_has_a_name_in_every_layout():
    table = lora_keys.table(CONFIG)
    reached = {leaf.path for one in table.components.values() for module in one.values() for leaf in module if leaf}
    assert reached == {path for path in SHAPES}


def test_a_layer_that_is_nearly_one_is_named(tmp_path):
    save_file(
        {"transformer.transformer_blocks.1.attn.to_kk.lora_A.weight": torch.ones(2, 16),
         "transformer.transformer_blocks.1.attn.to_k.lora_A.weight": torch.ones(2, 16),
         "transformer.transformer_blocks.1.attn.to_k.lora_B.weight": torch.ones(16, 2)},
        tmp_path / "lora.safetensors",
    )  # fmt: skip
    with pytest.raises(WeightsError, match=r"to_kk.lora_A.weight adapts no .*the closest is .*_\*_attn_to_k$"):
        lora.load(tmp_path / "lora.safetensors", CONFIG)
