"""Files of every published format, written and read by the libraries they come from."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from functional_sd3 import weights
from functional_sd3.core import tree
from functional_sd3.image import taesd
from functional_sd3.layouts import rules
from functional_sd3.transformer import mmdit
from functional_sd3.weights.diffusers import COMPONENTS, TAESD
from tests.parity.whole_models import BASE, TRANSFORMERS, config_of, random_model, state_of, write_with_diffusers
from tests.weights.gguf_files import write as write_gguf


def close(ours, theirs):
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@torch.no_grad()
@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("kind", ["stability", "single"])
def test_the_transformer_of_our_files_passes_diffusers_single_file_loader_with_equal_outputs(tmp_path, name, kind):
    from diffusers import SD3Transformer2DModel

    model = random_model(config_of(name))
    weights.save(tmp_path / "x.safetensors", model, layout=kind)
    weights.save(tmp_path / "folder", model)
    theirs = SD3Transformer2DModel.from_single_file(
        str(tmp_path / "x.safetensors"), config=str(tmp_path / "folder"), subfolder="transformer", local_files_only=True
    )
    expected = SD3Transformer2DModel.from_pretrained(tmp_path / "folder", subfolder="transformer").eval()
    state, wanted = theirs.state_dict(), expected.state_dict()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    generator = torch.Generator().manual_seed(0)
    latents, context, pooled = (
        torch.randn(shape, generator=generator) for shape in ((2, 16, 8, 8), (2, 5, 48), (2, 40))
    )
    steps = torch.tensor([300.0, 900.0])
    assert torch.equal(theirs(latents, context, pooled, steps).sample, expected(latents, context, pooled, steps).sample)


def test_the_other_components_of_our_files_pass_diffusers_own_converters(tmp_path):
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_sd3_t5_checkpoint_to_diffusers

    # Their converter counts the decoder's levels from a config of four.
    model = random_model(replace(BASE, vae=replace(BASE.vae, channels=(4, 8, 8, 8))))
    weights.save(tmp_path / "x.safetensors", model, layout="single")
    weights.save(tmp_path / "folder", model)
    vae = AutoencoderKL.from_single_file(
        str(tmp_path / "x.safetensors"), config=str(tmp_path / "folder"), subfolder="vae", local_files_only=True
    )
    expected = state_of(model, "vae")
    assert vae.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in vae.state_dict().items())
    tensors = load_file(tmp_path / "x.safetensors")
    t5 = convert_sd3_t5_checkpoint_to_diffusers(tensors)
    assert all(torch.equal(t5[key], value) for key, value in state_of(model, "t5").items())
    for name in ("clip_l", "clip_g"):
        prefix = f"text_encoders.{name}.transformer."
        actual = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        wanted = state_of(model, name)
        assert actual.keys() == wanted.keys() and all(torch.equal(actual[key], wanted[key]) for key in wanted)


def test_each_folder_and_file_of_a_pipeline_of_theirs_loads_alone_and_together(tmp_path):
    pipeline = tmp_path / "model"
    write_with_diffusers(pipeline, BASE)
    whole = weights.load(pipeline)
    paths = {name: pipeline / component.folder for name, component in COMPONENTS.items()}
    for name, path in paths.items():
        actual = weights.load(path)
        assert list(actual.params) == [name]
        assert getattr(actual.config, name) == getattr(BASE, name)
        assert tree.diff(actual.params[name], whole.params[name]) == []
    assert tree.diff(weights.load(list(paths.values())).params, whole.params) == []
    files = [next(path.glob("*.safetensors")) for path in paths.values()]
    assert tree.diff(weights.load(files).params, whole.params) == []


def test_files_without_projection_or_with_old_names_load(tmp_path):
    write_with_diffusers(tmp_path / "model", BASE)
    tensors = load_file(tmp_path / "model" / "text_encoder" / "model.safetensors")
    del tensors["text_projection.weight"]
    tensors["text_model.embeddings.position_ids"] = torch.arange(20)[None]
    tensors["logit_scale"] = torch.tensor(4.6)
    save_file(tensors, tmp_path / "clip.safetensors")
    actual = weights.load(tmp_path / "clip.safetensors").params["clip_l"]
    assert torch.equal(actual["projection"]["weight"], torch.eye(16))


@pytest.fixture(scope="module")
def tiny():
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    return AutoencoderTiny(latent_channels=16, latent_magnitude=3, scaling_factor=1.0, shift_factor=0.0).eval()


def original_halves(tiny) -> dict[str, dict[str, torch.Tensor]]:
    """The author's two files: positions in a sequence, the decoder's one higher for its clamp."""
    encoder = {name.removeprefix("layers."): value for name, value in tiny.encoder.state_dict().items()}
    decoder = {}
    for name, value in tiny.decoder.state_dict().items():
        _, place, rest = name.split(".", 2)
        decoder[f"{int(place) + 1}.{rest}"] = value
    return {"encoder": encoder, "decoder": decoder}


@torch.no_grad()
def test_taesd_computes_what_autoencoder_tiny_computes(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "taesd")
    model = weights.load(tmp_path / "taesd")
    assert model.config == weights.Config(taesd=taesd.TAESD3)
    params, config = model.params["taesd"], model.config.taesd
    assert sum(leaf.numel() for leaf in tree.leaves(params)) == 2_458_899
    generator = torch.Generator().manual_seed(1)
    for height, width in ((32, 48), (24, 16)):
        images = torch.rand((2, 3, height, width), generator=generator) * 2 - 1
        latents = torch.randn((2, 16, height // 8, width // 8), generator=generator) * 2
        close(taesd.encode(params, config, images), tiny.encode(images).latents)
        close(taesd.decode(params, config, latents), tiny.decode(latents).sample)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_authors_two_files_of_taesd_make_the_same_tree(tiny, tmp_path, suffix):
    tiny.save_pretrained(tmp_path / "theirs")
    expected = weights.load(tmp_path / "theirs").params
    paths = []
    for half, state in original_halves(tiny).items():
        paths.append(tmp_path / f"of_the_{half}.{suffix}")
        torch.save(state, paths[-1]) if suffix == "pth" else save_file(state, paths[-1])
    for order in (paths, paths[::-1]):
        assert tree.diff(weights.load(order).params, expected) == []
    with pytest.raises(weights.WeightsError, match="the encoder of TAESD is missing"):
        weights.load(paths[1])


def test_a_pipeline_with_taesd_in_place_of_its_vae_loads_and_ours_beside_it_loads_in_diffusers(tiny, tmp_path):
    from diffusers import AutoencoderTiny

    write_with_diffusers(tmp_path / "model", BASE)
    tiny.save_pretrained(tmp_path / "model" / "vae")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "vae": ["diffusers", "AutoencoderTiny"]}))
    model = weights.load(tmp_path / "model")
    assert set(model.params) == {"clip_l", "clip_g", "t5", "transformer", "taesd"}
    weights.save(tmp_path / "ours", model)
    again = AutoencoderTiny.from_pretrained(tmp_path / "ours", subfolder=TAESD.folder)
    assert all(torch.equal(value, tiny.state_dict()[key]) for key, value in again.state_dict().items())
    assert tree.diff(weights.load(tmp_path / "ours").params, model.params) == []


SCALED = {
    "old names": ("scale_weight", "scale_input", {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}),
    "new names": ("weight_scale", "input_scale", {}),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer."])
def test_scaled_fp8_files_load_as_weight_times_scale(tmp_path, name, prefix):
    scale_name, input_name, marker = SCALED[name]
    model = random_model(BASE)
    theirs, expected = dict(marker), {}
    for key, value in state_of(model, "t5").items():
        if "SelfAttention." in key and "bias" not in key or "DenseReluDense" in key:
            scale = value.abs().max() / 448
            theirs[prefix + key] = (value / scale).to(torch.float8_e4m3fn)
            layer = prefix + key.removesuffix("weight")
            theirs[layer + scale_name] = scale if "wo" in key else scale.reshape(1)
            theirs[layer + input_name] = torch.ones(())
            if name == "new names":
                note = json.dumps({"format": "float8_e4m3fn"}).encode()
                theirs[layer + "comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
            expected[key] = theirs[prefix + key].float() * scale
        else:
            theirs[prefix + key] = expected[key] = value.half() if "shared" in key else value
    path = tmp_path / "t5xxl_fp8_e4m3fn_scaled.safetensors"
    save_file(theirs, path)
    actual = weights.load(path, dtype=torch.float32)
    spec = weights.SPECS["t5"](BASE.t5)
    table = COMPONENTS["t5"].layout
    ours = rules.to_ours(
        table, spec, lambda source, _: source.transform.join([expected[n].float() for n in source.names])
    )
    assert actual.config.t5 == BASE.t5
    assert tree.diff(actual.params["t5"], ours) == []
    half = weights.load(path, dtype=torch.bfloat16).params["t5"]
    assert tree.diff(half, tree.cast(ours, torch.bfloat16)) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_files_of_narrow_floats_load_in_their_own_or_the_requested_dtype(tmp_path, dtype):
    model = random_model(BASE)
    stored = {key: value.to(dtype) for key, value in state_of(model, "t5").items()}
    save_file(stored, tmp_path / "x.safetensors")
    actual = weights.load(tmp_path / "x.safetensors", dtype="stored").params["t5"]
    assert actual["embedding"]["weight"].dtype == dtype
    wide = weights.load(tmp_path / "x.safetensors", dtype=torch.bfloat16).params["t5"]
    assert torch.equal(wide["embedding"]["weight"], stored["shared.weight"].to(torch.bfloat16))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
def test_a_gguf_file_computes_what_diffusers_computes_of_it_but_for_its_rounding_to_half(tmp_path, kind):
    import gguf
    from diffusers import GGUFQuantizationConfig, SD3Transformer2DModel

    sizes = {"heads": 4, "head_dim": 16, "context_width": 64, "pooled_width": 32, "sample_size": 128}
    config = replace(BASE.transformer, **sizes, qk_norm=True, dual_attention_layers=(0,))
    model = random_model(weights.Config(transformer=config))
    weights.save(tmp_path / "folder", model)
    weights.save(tmp_path / "x.safetensors", model, layout="stability")
    tensors = {
        name.removeprefix("model.diffusion_model."): value
        for name, value in load_file(tmp_path / "x.safetensors").items()
    }
    write_gguf(tmp_path / "x.gguf", tensors, gguf.GGMLQuantizationType[kind])
    theirs = SD3Transformer2DModel.from_single_file(
        str(tmp_path / "x.gguf"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        config=str(tmp_path / "folder"),
        subfolder="transformer",
        torch_dtype=torch.float32,
        local_files_only=True,
    )
    ours = weights.load(tmp_path / "x.gguf", dtype=torch.float32)
    assert ours.config.transformer == config
    generator = torch.Generator().manual_seed(0)
    latents, context, pooled = (
        torch.randn(shape, generator=generator) for shape in ((2, 16, 8, 8), (2, 5, 64), (2, 32))
    )
    t = torch.tensor([0.3, 0.9])
    expected = theirs(latents, context, pooled, 1000 * t).sample
    # Their factor times their whole number is a float16, whatever they are told to compute in.
    half = tree.map(lambda leaf: leaf.half().float() if leaf.ndim == 2 else leaf, ours.params["transformer"])
    close(mmdit.apply(half, config, latents, t, context, pooled), expected)
    exact = mmdit.apply(ours.params["transformer"], config, latents, t, context, pooled)
    assert 1e-5 < (exact - expected).norm() / expected.norm() < 2e-3
