"""No function depends on PyTorch's default dtype or default device: the same bits under each of them."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

import functional_sd3
from functional_sd3 import lora, pipeline, weights
from functional_sd3.core import layers, prng, transform, tree
from functional_sd3.flow import guidance, ode, path, schedule
from functional_sd3.flow.analysis import divergence, geometry, inversion, likelihood, spectral
from functional_sd3.flow.ode import adaptive, fixed_point
from functional_sd3.image import clip_pixels, pixels, taesd, vae
from functional_sd3.metrics import (
    cmmd,
    density_coverage,
    frechet,
    inception_score,
    kid,
    precision_recall,
    preprocess,
    similarity,
)  # fmt: skip
from functional_sd3.recipes import shapes
from functional_sd3.recipes.shapes import prompts
from functional_sd3.text import clip, conditioning, t5
from functional_sd3.text.clip import dual as clip_dual
from functional_sd3.text.clip import image as clip_image
from functional_sd3.training import muon, objectives, optim, schedules, step
from functional_sd3.transformer import control, controlnet, mmdit
from tests import models

CLIP = clip_dual.Config(
    clip.Config(vocab=50, length=8, width=16, layers=1, heads=2, mlp_width=32, projection_width=8),
    clip_image.Config(size=32, patch=8, width=16, layers=1, heads=2, mlp_width=32, projection_width=8),
)
PROMPTS = ["a large red circle", "a (small:1.3) blue star"]


def key(number: int = 3) -> torch.Tensor:
    return prng.key(number)


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return prng.normal(key(seed), shape)


def check_random() -> list:
    return [
        prng.split(key()), prng.fold_in(key(), 5), prng.bits(key(), 9), prng.uniform(key(), 9), noise(9),
        prng.uniform(key(), 5, minval=-1.5, maxval=3.3), prng.normal(key(), 9, torch.float64),
        prng.bernoulli(key(), 0.3, (20,)), prng.randint(key(), 9, 0, 100), prng.permutation(key(), 30),
        path.logit_normal(key(), (9,)), path.mode(key(), (9,)), path.cosine_map(key(), (9,)),
        path.logit_normal_log_density(prng.uniform(key(), 9)),
    ]  # fmt: skip


def check_grids() -> list:
    dynamic = schedule.Config(use_dynamic_shifting=True)
    spaced = [replace(schedule.Config(), **{f"use_{name}_sigmas": True}) for name in ("karras", "exponential", "beta")]
    return [
        schedule.sigmas(28), schedule.sigmas(5, shift=2.3, double_shift=False),
        schedule.from_config(dynamic, 9, mu=schedule.resolution_mu(dynamic, 600)),
        *(schedule.from_config(one, 9) for one in spaced),
        schedule.from_config(schedule.Config(shift_terminal=0.1), 9),
        schedule.from_levels(schedule.Config(), [1.0, 0.7, 0.2]),
    ]  # fmt: skip


def check_runs() -> list:
    x, grid = noise(2, 3, 4, 4), [1.0, 0.7, 0.3, 0.0]

    def velocity(x, t):
        return torch.sin(x) - 0.3 * x

    methods = [*ode.METHODS.values(), *(make(key(4)) for make in ode.STOCHASTIC.values())]
    runs = [ode.integrate(method, velocity, x, grid) for method in methods]
    counts = [ode.evaluations(method, 4) for method in methods]
    solution = adaptive.solve(ode.DOPRI5, velocity, x, [1.0, 0.0], rtol=1e-4, atol=1e-4)
    estimate = likelihood.estimate(velocity, x, method=ode.HEUN, times=[0.0, 0.5, 1.0], key=key(5), probes=2)
    return [
        *runs, counts, solution.x, solution.h, *estimate,
        divergence.exact(velocity, x, 0.4), likelihood.invert(velocity, x),
        fixed_point.inverse(ode.EULER, tolerance=1e-6).step(velocity, x, x.new_zeros(()), x.new_full((), 0.2), []).x,
        inversion.round_trip(velocity, x, [0.0, 0.5, 1.0]).error,
        geometry.straightness(geometry.trajectory(ode.EULER, velocity, x, grid)),
        geometry.lipschitz(velocity, x, x.new_full((), 0.4), key(6), probes=2, iterations=3),
    ]  # fmt: skip


def check_layers() -> list:
    wide = {"weight": noise(64, 64, 3, 3) / 24, "bias": noise(64)}
    image = noise(1, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    line = {"weight": noise(24, 16), "bias": noise(24)}
    return [
        layers.conv2d(wide, image, padding=1), layers.upsample_conv2d(wide, image),
        layers.group_norm({"weight": noise(64), "bias": noise(64)}, image.repeat(1, 1, 4, 4), 32, 1e-6),
        layers.linear(line, noise(40, 16)), layers.linear_activation(line, noise(2, 20, 16), "gelu_tanh"),
        layers.rms_norm({"weight": noise(16)}, noise(4, 16), 1e-6),
        spectral.lanczos(lambda v: v * v.new_tensor(range(30)), key(), 30, steps=4),
    ]  # fmt: skip


def check_text(model) -> list:
    params, config, tokenizers = model.params, model.config, model.tokenizers
    ids = conditioning.tokenize(config, tokenizers, PROMPTS, t5_length=20)
    return [
        *ids, clip.apply(params["clip_l"], config.clip_l, ids.clip_l), t5.apply(params["t5"], config.t5, ids.t5),
        conditioning.apply(params, config, tokenizers, PROMPTS, t5_length=20),
        conditioning.apply(params, config, tokenizers, PROMPTS, t5_length=20, weighted=True, long_prompts=True),
    ]  # fmt: skip


def check_images(model) -> list:
    params, config = model.params["vae"], model.config.vae
    image = prng.uniform(key(), (2, 3, 64, 64))
    posterior = vae.encode(params, config, pixels.to_signed(image))
    small = taesd.Config(width=8)
    little = taesd.init(key(), small)
    latents = noise(1, 16, 8, 8)
    return [
        posterior, vae.sample(posterior, key()), vae.decode(params, config, posterior.mean),
        vae.decode_tiled(params, config, noise(1, 16, 24, 24), tile=16, overlap=4),
        taesd.decode(little, small, latents), taesd.encode(little, small, image),
        pixels.to_bytes(image), pixels.from_pil(pixels.to_pil(image)), pixels.grid(image),
        clip_image.apply(clip_image.init(key(), CLIP.image), CLIP.image, noise(1, 3, 32, 32)),
        clip_pixels.apply(clip_pixels.Config(resize=32, crop=32), image), clip_pixels.apply(clip_pixels.Config(), []),
    ]  # fmt: skip


def check_transformer(model) -> list:
    params, config = model.params["transformer"], model.config.transformer
    latents, context, pooled = noise(2, 16, 8, 8), noise(2, 9, config.context_width), noise(2, config.pooled_width)
    t = prng.uniform(key(), 2)
    net = controlnet.Config(
        depth=1, heads=2, head_dim=16, context_width=config.context_width, pooled_width=config.pooled_width,
        position_size=12, sample_size=8,
    )  # fmt: skip
    own = controlnet.init(key(), net)
    return [
        mmdit.apply(params, config, latents, t, context, pooled),
        mmdit.apply(params, config, latents, t, context, pooled, implementation="math", skip_layers=(1,)),
        mmdit.init(key(), config), controlnet.apply(own, net, latents, t, context, pooled, latents, 0.7),
        control.residuals([control.Control(own, net, latents, 0.5)], params, config, latents, t, context, pooled),
        torch.func.jvp(
            lambda t: mmdit.apply(params, config, latents, t, context, pooled, implementation="math"),
            (t,), (torch.ones_like(t),),
        ),
    ]  # fmt: skip


def check_drawing(model) -> list:
    given = models.parts(model)
    image = prng.uniform(key(), (1, 3, 64, 64))
    mask = (prng.uniform(key(9), (1, 1, 64, 64)) > 0.5).float()
    guided = guidance.rescaled(guidance.apg(4.0), 0.5)
    return [
        pipeline.generate(*given, PROMPTS, key(), steps=8),
        pipeline.generate(*given, PROMPTS[0], key(), steps=3, guidance=guided, method=ode.ancestral(key(8))),
        pipeline.image_to_image(*given, PROMPTS[0], image, key(), steps=4),
        pipeline.inpaint(*given, PROMPTS[0], image, mask, key(), steps=3, soften=2.0),
        pipeline.interpolate(*given, PROMPTS, key(), frames=3, steps=2),
        pipeline.variations(*given, PROMPTS[0], key(), towards=key(4), steps=2),
        pipeline.tiled(*given, PROMPTS[0], key(), height=96, width=64, tile=64, overlap=16, steps=2),
        pipeline.edit(*given, *PROMPTS, image, steps=2), pipeline.flow_edit(*given, *PROMPTS, image, key(), steps=3),
        pipeline.outpaint(*given, PROMPTS[0], image[..., :48], key(), right=16, steps=2),
    ]  # fmt: skip


def check_training(model) -> list:
    config = model.config
    params = {"transformer": model.params["transformer"]}
    batch = {
        "latents": noise(2, 16, 8, 8), "context": noise(2, 9, config.transformer.context_width),
        "pooled": noise(2, config.transformer.pooled_width),
    }  # fmt: skip
    empty = {name: part[:1] for name, part in batch.items() if name != "latents"}
    rate = schedules.warmup_cosine(1e-3, 2, 10)
    loss = objectives.flow_loss(config, shift=2.0, dropout=0.5, empty=empty)
    trained = []
    rules = {"matrices": muon.muon(rate), "rest": optim.adamw(rate)}
    both = optim.partitioned(rules, lambda _, leaf: "matrices" if leaf.ndim == 2 else "rest")
    for optimizer in (optim.adamw(rate), both):
        state = step.init(key(), params, optimizer)
        for donate in (False, True):
            train_step = step.make_train_step(loss, optimizer, ema_decay=0.99, rate=rate, donate=donate)
            state, metrics = train_step(state, batch)
            trained.append((tree.map(torch.clone, state.params), tree.map(torch.clone, state.ema), metrics))
    steps = torch.arange(12, dtype=torch.int64, device="cpu")
    return [
        trained, lora.init(key(), config, 2), transform.hvp(lambda x: x.square().sum(), noise(3), noise(3)),
        [schedules.trapezoid(1e-3, 2, 10)(n) for n in steps], [rate(n) for n in steps],
        objectives.vae_loss(config.vae, edges=0.1)(
            model.params["vae"], {"images": pixels.to_signed(prng.uniform(key(), (1, 3, 64, 64)))}, prng.split(key(), 1)
        ),
        shapes.images(key(), 2),
    ]  # fmt: skip


def check_metrics() -> list:
    x, y = noise(40, 8), noise(30, 8, seed=4) + 0.3
    image, other = prng.uniform(key(), (2, 3, 32, 32)), prng.uniform(key(4), (2, 3, 32, 32))
    drawn = pixels.from_pil([shapes.draw(one) for one in shapes.scenes(key(), 2)])
    return [
        kid.distance(x, y, key(), subsets=3, size=20), cmmd.distance(x, y), precision_recall.score(x, y),
        density_coverage.score(x, y), frechet.distance(frechet.statistics(x), frechet.statistics(y)),
        inception_score.score(noise(40, 9), splits=3), similarity.psnr(image, other), similarity.ssim(image, other),
        preprocess.clean(image), preprocess.tf1(image), preprocess.pytorch_fid(image),
        repr([prompts.read(one) for one in drawn]), clip_dual.init(key(), CLIP),
    ]  # fmt: skip


def check_files(folder) -> list:
    loaded = weights.load(folder)
    return [loaded.params, repr(loaded.config)]


CHECKS = {
    "random numbers": (check_random, ()),
    "grids": (check_grids, ()),
    "runs": (check_runs, ()),
    "layers": (check_layers, ()),
    "text": (check_text, ("model",)),
    "images": (check_images, ("model",)),
    "transformer": (check_transformer, ("model",)),
    "drawing": (check_drawing, ("model",)),
    "training": (check_training, ("model",)),
    "metrics": (check_metrics, ()),
    "files": (check_files, ("folder",)),
}


@pytest.fixture(scope="module")
def usual():
    """name -> its results under float32 and the CPU, computed once."""
    return {}


@pytest.mark.filterwarnings("ignore::functional_sd3.metrics.frechet.FewSamples")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16, "meta"], ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_results_do_not_depend_on_the_default_dtype_and_device(name, default, usual, request):
    run, needs = CHECKS[name]
    given = [request.getfixturevalue(need) for need in needs]
    if name not in usual:
        usual[name] = flat(run(*given))
    if default == "meta":
        with torch.device("meta"):
            found = flat(run(*given))
    else:
        torch.set_default_dtype(default)
        try:
            found = flat(run(*given))
        finally:
            torch.set_default_dtype(torch.float32)
    assert len(found) == len(usual[name]) > 0
    for index, (ours, theirs) in enumerate(zip(found, usual[name], strict=True)):
        if isinstance(ours, torch.Tensor):
            assert ours.dtype == theirs.dtype and ours.device.type == "cpu", (index, ours.dtype, ours.device)
            assert numpy.array_equal(ours.float(), theirs.float(), equal_nan=True), index
        else:
            assert ours == theirs, index


def flat(results) -> list:
    from torch.utils import _pytree

    return [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in _pytree.tree_leaves(results)]


PACKAGE = Path(functional_sd3.__file__).parent
CREATORS = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "hann_window", "linspace", "logspace",
    "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices",
    "triu_indices", "zeros",
}  # fmt: skip


def test_every_tensor_is_created_with_its_dtype_and_device():
    lacking = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr in CREATORS and ast.unparse(node.func.value) == "torch":
                named = {keyword.arg for keyword in node.keywords}
                if not {"dtype", "device"} <= named and None not in named:
                    lacking.append(f"{file}:{node.lineno}: {ast.unparse(node)}")
    assert not lacking, "\n".join(lacking)
