"""Wrong arguments are refused at the boundary, in a sentence that names them and what would be right."""

import math
import re

import pytest
import torch

from functional_sd3 import pipeline
from functional_sd3.core import prng
from functional_sd3.flow import guidance
from functional_sd3.image import control as control_image
from functional_sd3.image import pixels, taesd, vae
from functional_sd3.metrics import cmmd, frechet, kid, preprocess, similarity
from functional_sd3.text import clip, t5
from functional_sd3.text.clip import image as clip_image
from functional_sd3.transformer import controlnet, ip_adapter, mmdit
from tests import models

X = torch.zeros(2, 16, 8, 8)
IMAGES = torch.zeros(1, 3, 16, 16)
BYTES = IMAGES.to(torch.uint8)
T = torch.full((2,), 0.5)
IDS = torch.ones(1, 4, dtype=torch.int64)


@pytest.fixture(scope="module")
def calls(model):
    """name -> a call with every argument right but those given."""
    params, config = model.params, model.config
    sizes = config.transformer
    context, pooled = torch.zeros(2, 5, sizes.context_width), torch.zeros(2, sizes.pooled_width)
    net = controlnet.Config(
        depth=1, heads=2, head_dim=16, context_width=sizes.context_width, pooled_width=sizes.pooled_width,
        position_size=12, sample_size=8,
    )  # fmt: skip
    adapter = ip_adapter.Config(
        width=sizes.width, head_dim=sizes.head_dim, attentions=sizes.depth + len(sizes.dual_attention_layers),
        image_width=8, hidden_width=16, heads=2, resampler_head_dim=8, mlp_width=32, depth=1, tokens=2,
    )  # fmt: skip
    small = taesd.Config(width=4)
    tiny, own = taesd.init(prng.key(0), small), controlnet.init(prng.key(0), net)
    prompt = ip_adapter.init(prng.key(0), adapter)
    seen = clip_image.Config(size=16, patch=8, width=16, layers=1, heads=2, mlp_width=32, projection_width=8)

    def transformer(latents=X, t=T, context=context, pooled=pooled):
        return mmdit.apply(params["transformer"], sizes, latents, t, context, pooled)

    def control(latents=X, t=T, context=context, pooled=pooled, image=X):
        return controlnet.apply(own, net, latents, t, context, pooled, image)

    def shown(features=torch.zeros(2, 3, 8), t=T):  # noqa: B008
        return ip_adapter.apply(prompt, adapter, features, t, sizes)

    return {
        "mmdit": transformer,
        "controlnet": control,
        "ip_adapter": shown,
        "vae.encode": lambda images: vae.encode(params["vae"], config.vae, images),
        "vae.decode": lambda latents: vae.decode(params["vae"], config.vae, latents),
        "taesd.encode": lambda images: taesd.encode(tiny, small, images),
        "taesd.decode": lambda latents: taesd.decode(tiny, small, latents),
        "clip": lambda ids: clip.apply(params["clip_l"], config.clip_l, ids),
        "t5": lambda ids: t5.apply(params["t5"], config.t5, ids),
        "clip_image": lambda images: clip_image.apply(clip_image.init(prng.key(0), seen), seen, images),
        "control image": lambda images: control_image.encode(params["vae"], config.vae, images),
        "encode_images": lambda images: pipeline.encode_images(params, config, images),
    }


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("mmdit", {"latents": X.long()}, "latents of dtype torch.int64 must be floating"),
        ("mmdit", {"context": torch.zeros(2, 5, 1).int()}, "context of dtype torch.int32 must be floating"),
        ("mmdit", {"pooled": torch.zeros(2, 1).bool()}, "pooled of dtype torch.bool must be floating"),
        ("mmdit", {"t": 0.5}, "t is 0.5, not a tensor: give torch.tensor(0.5), in [0, 1]"),
        ("mmdit", {"t": torch.tensor([500, 20])}, "t of dtype torch.int64 must be floating, in [0, 1], 1 = noise"),
        ("mmdit", {"t": torch.zeros(3)}, "t [3] must be () or (2,)"),
        ("mmdit", {"t": torch.zeros(2, 1)}, "t [2, 1] must be () or (2,)"),
        ("mmdit", {"t": torch.zeros(0)}, "t [0] must be () or (2,)"),
        ("mmdit", {"latents": X.tolist()}, "latents is a list, not a tensor"),
        ("controlnet", {"latents": X.int()}, "latents of dtype torch.int32 must be floating"),
        ("controlnet", {"image": X.to(torch.uint8)}, "image_latents of dtype torch.uint8 must be floating"),
        ("controlnet", {"t": 1.0}, "t is 1.0, not a tensor"),
        ("controlnet", {"t": torch.zeros(1, 2)}, "t [1, 2] must be () or (2,)"),
        ("controlnet", {"context": torch.zeros(2, 5, 1).long()}, "context of dtype torch.int64"),
        ("ip_adapter", {"features": torch.zeros(2, 3, 8).long()}, "features of dtype torch.int64 must be floating"),
        ("ip_adapter", {"t": 0.5}, "t is 0.5, not a tensor"),
        ("vae.encode", {"images": BYTES}, "torch.uint8 must be floating, in [-1, 1]: pixels.to_signed(pixels.from_by"),
        ("vae.encode", {"images": IMAGES.double()}, "images of dtype torch.float64 must have the parameters' dtype"),
        ("vae.decode", {"latents": X.long()}, "latents of dtype torch.int64 must be floating"),
        ("vae.decode", {"latents": X.half()}, "latents of dtype torch.float16 must have the parameters' dtype"),
        ("taesd.encode", {"images": BYTES}, "torch.uint8 must be floating, in [-1, 1]"),
        ("taesd.decode", {"latents": X.long()}, "latents of dtype torch.int64 must be floating"),
        ("taesd.decode", {"latents": X.double()}, "latents of dtype torch.float64 must have the parameters' dtype"),
        ("clip", {"ids": IDS.float()}, "ids of dtype torch.float32 must be int64: token ids"),
        ("clip", {"ids": IDS.tolist()}, "ids are [[1, 1, 1, 1]], not a tensor"),
        ("t5", {"ids": IDS.half()}, "ids of dtype torch.float16 must be int64: token ids"),
        ("clip_image", {"images": BYTES}, "images of dtype torch.uint8 must be floating, normalised"),
        ("control image", {"images": BYTES}, "images of dtype torch.uint8 must be floating, in [0, 1]"),
        ("encode_images", {"images": BYTES}, "images of dtype torch.uint8 must be floating, in [0, 1]"),
    ],
)
def test_tensors_of_a_wrong_kind_are_named(calls, name, wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        calls[name](**wrong)


def test_right_arguments_of_other_dtypes_are_taken(calls):
    for dtype in (torch.float64, torch.bfloat16):
        assert calls["mmdit"](latents=X.to(dtype)).dtype == dtype
        assert calls["mmdit"](t=T.to(dtype)).dtype == torch.float32
    assert calls["clip"](IDS.int()).pooled.isfinite().all() and calls["t5"](IDS.int()).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert calls["vae.decode"](X.bfloat16()).shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pixels.to_bytes(BYTES), lambda: pixels.to_signed(BYTES), lambda: pixels.from_bytes(IMAGES),
        lambda: similarity.psnr(BYTES, BYTES), lambda: similarity.ssim(BYTES, BYTES),
        lambda: frechet.statistics(IDS), lambda: kid.distance(IDS, IDS, prng.key(0)), lambda: cmmd.distance(IDS, IDS),
        lambda: preprocess.clean(IMAGES.long()), lambda: preprocess.tf1(IMAGES.int()),
        lambda: preprocess.pytorch_fid(IMAGES.bool()),
    ],
)  # fmt: skip
def test_metrics_and_pixels_refuse_integers_that_are_no_bytes(call):
    with pytest.raises(ValueError, match="floating|float|uint8"):
        call()


SCALED = {
    "cfg": guidance.cfg,
    "zero_star": guidance.zero_star,
    "tangential": guidance.tangential,
    "magnitude_aware": guidance.magnitude_aware,
    "rate": lambda scale: guidance.magnitude_aware(2.0, scale),
    "auto": lambda scale: guidance.auto(scale, {}),
    "composed": lambda scale: guidance.composed(guidance.cfg(2.0), ((X, X), scale)),
    "skip_layer": lambda scale: guidance.skip_layer(guidance.cfg(2.0), (1,), scale),
    "perturbed": lambda scale: guidance.perturbed(guidance.cfg(2.0), (1,), scale),
    "smoothed": lambda scale: guidance.smoothed(guidance.cfg(2.0), (1,), scale),
    "rescaled": lambda scale: guidance.rescaled(guidance.cfg(2.0), scale),
    "apg": guidance.apg,
    "momentum": lambda scale: guidance.apg(2.0, momentum=scale),
    "eta": lambda scale: guidance.apg(2.0, eta=scale),
    "mixed_apg": guidance.mixed_apg,
    "mixed_apg's second": lambda scale: guidance.mixed_apg(2.0, scale),
    "classifier_free": lambda scale: guidance.classifier_free(lambda x, t: x, lambda x, t: x, scale),
    "batched": lambda scale: guidance.batched(lambda x, t, y: x, (X,), (X,), scale),
}


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan, torch.tensor(math.nan), torch.tensor([1, math.inf]),
                                   None, "5", True], ids=repr)  # fmt: skip
@pytest.mark.parametrize("name", SCALED)
def test_a_scale_that_is_no_finite_number_is_refused_where_it_is_given(name, wrong):
    with pytest.raises(ValueError, match="must be (a )?(finite|number|in)"):
        SCALED[name](wrong)


@pytest.mark.parametrize("wrong", [math.inf, math.nan, torch.tensor(math.inf), None], ids=repr)
def test_cfg_is_refused_before_anything_is_computed(model, wrong, monkeypatch):
    monkeypatch.setattr(clip, "apply", lambda *_, **__: pytest.fail("the prompt was encoded"))
    with pytest.raises(ValueError, match=r"cfg .* must be (a )?finite"):
        pipeline.generate(*models.parts(model), "a red circle", prng.key(0), cfg=wrong, steps=1)
    conditions = pipeline.Conditions(None, None)
    with pytest.raises(ValueError, match=r"cfg .* must be (a )?finite"):
        pipeline.sample(model.params, model.config, conditions, X, cfg=wrong, steps=1)
    with pytest.raises(ValueError, match="scale .* must be (a )?finite"):
        pipeline.velocity(model.params, model.config, conditions, wrong)


def test_scales_that_are_traced_or_mapped_are_not_looked_at():
    def of(scale):
        return guidance.classifier_free(lambda x, t: 2 * x, lambda x, t: x, scale)(X, T)

    assert torch.func.vmap(of)(torch.tensor([1.0, 2.0])).shape == (2, *X.shape)
    assert torch.func.grad(lambda scale: of(scale).sum())(torch.tensor(2.0)) == 0
    assert of(lambda t: 2 * t).shape == X.shape
