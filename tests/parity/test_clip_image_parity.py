"""CLIP with both encoders against transformers: encoders, logits, folders, preprocessing, and the released key sets."""

import json
from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image

from functional_sd3 import weights
from functional_sd3.image import clip_pixels
from functional_sd3.layouts import rules
from functional_sd3.layouts.clip_dual import LAYOUT
from functional_sd3.text import clip
from functional_sd3.text.clip import dual as clip_dual

transformers = pytest.importorskip("transformers")
FEW = {"vocab": 300, "layers": 1, "eos_id": 299}
CONFIGS = {
    "ViT-B/32": clip_dual.Config(replace(clip.CLIP_B, **FEW), replace(clip.IMAGE_B32, layers=2)),
    "ViT-L/14, smaller images": clip_dual.Config(
        replace(clip.CLIP_L, **FEW), replace(clip.IMAGE_L14, layers=2, size=56)
    ),
    "small, gelu, a remainder": clip_dual.Config(
        clip.Config(300, 20, 48, 2, 3, 100, "gelu", 40, eos_id=299),
        clip.ImageConfig(30, 8, 36, 3, 4, 72, "gelu", 40),
    ),
}


def theirs(config: clip_dual.Config, *, empty: bool = False):
    text, image = config.text, config.image
    wanted = transformers.CLIPConfig(
        projection_dim=text.projection_width,
        text_config={
            "vocab_size": text.vocab, "max_position_embeddings": text.length, "hidden_size": text.width,
            "num_hidden_layers": text.layers, "num_attention_heads": text.heads, "intermediate_size": text.mlp_width,
            "hidden_act": text.activation, "eos_token_id": text.eos_id, "bos_token_id": 0,
        },
        vision_config={
            "image_size": image.size, "patch_size": image.patch, "hidden_size": image.width,
            "num_hidden_layers": image.layers, "num_attention_heads": image.heads,
            "intermediate_size": image.mlp_width, "hidden_act": image.activation,
        },
    )  # fmt: skip
    if empty:
        with torch.device("meta"):
            return transformers.CLIPModel(wanted)
    # Its parameters are drawn from the global generator, which stands elsewhere in every order of the tests.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(wanted).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                # Wide enough that attention is not uniform and a change of any layer shows.
                parameter.copy_(noise * (1.2 / parameter[0].numel() ** 0.5))
            elif name != "logit_scale":
                parameter.add_(0.2 * noise)
    return model


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """Their model, and ours loaded from the folder that they wrote."""
    config = CONFIGS[request.param]
    model, folder = theirs(config), tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    loaded = weights.load_clip(folder)
    assert loaded.config == config and loaded.tokenizer is None
    assert loaded.pixels == clip_pixels.Config(config.image.size, config.image.size)
    return config, model, loaded


def inputs(config: clip_dual.Config) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 298, (3, 12), generator=generator)
    ids[0, 5] = ids[1, 11] = ids[2, 7] = 299
    return ids, torch.randn(2, 3, config.image.size, config.image.size, generator=generator)


@torch.no_grad()
def test_the_image_encoder_equals_transformers(pair):
    config, model, loaded = pair
    images = inputs(config)[1]
    expected = model.vision_model(images, output_hidden_states=True)
    actual = clip.image_apply(loaded.params["image"], config.image, images)
    assert error(actual.last, expected.last_hidden_state) <= 1e-5
    assert error(actual.penultimate, expected.hidden_states[-2]) <= 1e-5
    assert error(actual.pooled, expected.pooler_output) <= 1e-5
    assert error(actual.projected, model.visual_projection(expected.pooler_output)) <= 1e-5


@torch.no_grad()
def test_logits_of_both_encoders_equal_transformers(pair):
    config, model, loaded = pair
    ids, images = inputs(config)
    expected = model(input_ids=ids, pixel_values=images)
    assert error(clip_dual.apply(loaded.params, config, ids, images), expected.logits_per_image) <= 1e-5
    assert error(clip_dual.text_embeddings(loaded.params, config, ids), expected.text_embeds) <= 1e-5
    assert error(clip_dual.image_embeddings(loaded.params, config, images), expected.image_embeds) <= 1e-5


@pytest.mark.parametrize("config", [clip_dual.VIT_B32, clip_dual.VIT_L14, clip_dual.VIT_L14_336])
def test_the_released_layouts_have_exactly_transformers_names_and_shapes(config):
    expected = {name: tuple(value.shape) for name, value in theirs(config, empty=True).state_dict().items()}
    assert rules.keys(LAYOUT, clip_dual.spec(config)) == expected


def originals() -> list[Image.Image]:
    """Upright, wide, tiny, of the wanted size, with transparency, grey, a palette."""
    generator = numpy.random.default_rng(0)

    def noise(*shape):
        return Image.fromarray(generator.integers(0, 256, shape, dtype=numpy.uint8))

    smooth = Image.radial_gradient("L").resize((500, 333))
    return [
        noise(301, 224, 3), noise(97, 450, 3), noise(5, 3, 3), noise(224, 224, 3), noise(64, 48, 4),
        noise(40, 70), noise(50, 50, 3).quantize(17), smooth,
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(8))
def test_preprocessing_equals_the_processor_to_the_bit(index):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    img = originals()[index]
    for config in (clip_pixels.Config(), clip_pixels.Config(resize=60, crop=49, mean=(0.5, 0.4, 0.3))):
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": config.resize}, crop_size={"height": config.crop, "width": config.crop},
            image_mean=list(config.mean), image_std=list(config.std),
        )  # fmt: skip
        expected = processor(images=img, return_tensors="pt")["pixel_values"]
        assert torch.equal(clip_pixels.apply(config, img), expected)


def test_the_preprocessing_that_a_folder_names_is_read(pair, tmp_path):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config, model, _ = pair
    model.save_pretrained(tmp_path)
    side = config.image.size
    CLIPImageProcessorPil(
        size={"shortest_edge": side + 5}, crop_size=side, image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3]
    ).save_pretrained(tmp_path)
    actual = weights.load_clip(tmp_path).pixels
    assert actual == clip_pixels.Config(side + 5, side, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    # As files of 2021 have it.
    old = {"size": side + 5, "crop_size": side, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert weights.load_clip(tmp_path).pixels == actual


@torch.no_grad()
def test_clip_score_of_a_folder_that_their_processor_wrote_equals_theirs(shared_data, tmp_path):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from functional_sd3.metrics import clip_images

    config = clip_dual.Config(
        clip.Config(49408, 77, 32, 2, 2, 48, projection_width=24, eos_id=49407),
        clip.ImageConfig(32, 8, 32, 2, 2, 48, projection_width=24),
    )
    model = theirs(config)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(shared_data / "tokenizers" / "tokenizer")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path)
    transformers.CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(tmp_path)
    captions = ["a cat!", "two dogs left of a very big house", "x" * 400, "", "größe 漢字"]
    ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    images = processor(images=originals()[:5], return_tensors="pt")["pixel_values"]
    expected = model(input_ids=ids, pixel_values=images)
    cosines = (expected.image_embeds * expected.text_embeds).sum(-1)
    ours = weights.load_clip(tmp_path)
    actual = clip_images.scores(ours.params, ours.config, ours.tokenizer, ours.pixels, originals()[:5], captions)
    assert actual.max() > 1
    torch.testing.assert_close(actual, 100 * cosines.clamp(min=0).double(), rtol=1e-4, atol=1e-4)
