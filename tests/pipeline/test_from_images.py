"""Laws of drawing from images: what is kept, what changes, and that nothing else matters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_sd3 import pipeline
from functional_sd3.core import prng, tree
from functional_sd3.flow import guidance, ode, path, schedule
from functional_sd3.flow.ode import fixed_point
from functional_sd3.pipeline import masks
from functional_sd3.transformer.control import Control
from tests.models import parts

PROMPTS = ["a red circle", "a blue star"]


@pytest.fixture(scope="module")
def images():
    small = prng.uniform(prng.key(9), (2, 3, 6, 6))
    return torch.nn.functional.interpolate(small, (64, 64), mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="module")
def right_half():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    return mask


def test_strength_0_gives_the_image_back_encoded_and_decoded(model, images):
    back = pipeline.image_to_image(*parts(model), PROMPTS, images, prng.key(0), strength=0.0)
    expected = pipeline.decode(model.params, model.config, pipeline.encode_images(model.params, model.config, images))
    assert torch.equal(back, expected)


def test_strength_1_is_generate(model, images):
    drawn = pipeline.image_to_image(*parts(model), PROMPTS, images, prng.key(1), strength=1.0, steps=3)
    assert torch.equal(drawn, pipeline.generate(*parts(model), PROMPTS, prng.key(1), steps=3))


def test_strength_counts_the_steps_and_starts_from_their_level_of_noise(model, images):
    seen, noise = [], prng.normal(prng.key(3), (2, 16, 8, 8))
    pipeline.image_to_image(
        *parts(model), PROMPTS, images, prng.key(0), strength=0.2, steps=10, noise=noise, on_step=seen.append
    )
    assert [info.index for info in seen] == [0, 1] and seen[0].steps == 2
    latents = pipeline.encode_images(model.params, model.config, images)
    begun = pipeline.add_noise(model.config, latents, noise, 10, 0.2)
    assert torch.equal(begun.times, schedule.sigmas(10)[-3:])
    assert torch.equal(begun.x, path.interpolate(latents, noise, begun.times[0]))


def test_a_draw_of_the_posterior_is_the_mean_and_its_deviation_times_noise(model, images):
    from functional_sd3.image import pixels, vae

    posterior = vae.encode(model.params["vae"], model.config.vae, pixels.to_signed(images))
    keys = prng.split(prng.key(4), 2)
    noise = torch.stack([prng.normal(key, posterior.mean.shape[1:]) for key in keys])
    expected = vae.normalize(model.config.vae, posterior.mean + torch.exp(posterior.logvar / 2) * noise)
    drawn = pipeline.encode_images(model.params, model.config, images, key=keys)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)
    mean = pipeline.encode_images(model.params, model.config, images)
    torch.testing.assert_close(mean, vae.normalize(model.config.vae, posterior.mean), atol=1e-6, rtol=0)


def calls(model, images, mask):
    """Everything that draws, as functions of prompts, images and keys."""
    first = parts(model)
    left = pipeline.Region("a ring", 1 - mask, 0.7)
    return {
        "image_to_image": lambda p, i, k, **o: pipeline.image_to_image(*first, p, i, k, **o),
        "inpaint": lambda p, i, k, **o: pipeline.inpaint(*first, p, i, mask, k, soften=2.0, **o),
        "outpaint": lambda p, i, k, **o: pipeline.outpaint(*first, p, i[..., :48], k, left=16, overlap=8, **o),
        "edit": lambda p, i, k, **o: pipeline.edit(*first, "a ring", p, i, **o),
        "flow_edit": lambda p, i, k, **o: pipeline.flow_edit(*first, "a ring", p, i, k, **o),
        "variations": lambda p, i, k, **o: pipeline.variations(*first, p, k, towards=prng.fold_in(k, 1), **o),
        "regional": lambda p, i, k, **o: pipeline.regional(*first, p, [left], k, **o),
        "tiled": lambda p, i, k, **o: pipeline.tiled(*first, p, k, height=64, width=96, tile=64, **o),
        "trajectory": lambda p, i, k, **o: pipeline.trajectory(*first, p, k, **o).transpose(0, 1),
    }


NAMES = ["edit", "flow_edit", "image_to_image", "inpaint", "outpaint", "regional", "tiled", "trajectory", "variations"]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_depends_on_its_own_prompt_image_and_key_alone(model, images, right_half, name):
    draw, keys = calls(model, images, right_half)[name], prng.split(prng.key(5), 2)
    before, state = tree.map(torch.clone, model.params), torch.get_rng_state()
    together = draw(PROMPTS, images, keys, steps=2)
    for index, prompt in enumerate(PROMPTS):
        alone = draw(prompt, images[index : index + 1], keys[index : index + 1], steps=2)
        torch.testing.assert_close(alone[0], together[index], atol=1e-4, rtol=0)
    assert torch.equal(draw(PROMPTS, images, keys, steps=2), together)
    assert tree.allclose(before, model.params, rtol=0, atol=0) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_every_way_of_drawing_takes_the_options_of_the_sampler_and_is_differentiable(model, images, right_half, name):
    draw, seen = calls(model, images, right_half)[name], []
    scale = torch.tensor(3.0, requires_grad=True)
    given = images[:1].clone().requires_grad_()
    drawn = draw(
        PROMPTS[:1],
        given,
        prng.key(6),
        steps=2,
        guidance=guidance.zero_star(scale),
        method=ode.HEUN,
        negative="a ring",
        skip_layers=(1,),
        on_step=seen.append,
    )
    gradient, *from_image = torch.autograd.grad(drawn.square().mean(), (scale, given), allow_unused=True)
    assert torch.isfinite(gradient) and gradient != 0 and seen
    begins = name not in ("regional", "tiled", "trajectory", "variations")
    assert all((one is not None) == begins for one in from_image)
    plain = draw(PROMPTS[:1], images[:1], prng.key(6), steps=2)
    assert not torch.allclose(drawn, plain, atol=1e-3)


@pytest.mark.parametrize("method", [ode.EULER, ode.HEUN, ode.DPMPP_2M, ode.DOPRI5], ids=lambda method: method.name)
def test_what_a_mask_keeps_ends_as_the_image_for_every_method(model, images, right_half, method):
    latents = pipeline.encode_images(model.params, model.config, images)
    noise = prng.normal(prng.key(7), latents.shape)
    hold = pipeline.keep_masked(latents, noise, pipeline.unmask_times(right_half[..., ::8, ::8], schedule.sigmas(4)))
    conditions = pipeline.encode(*parts(model), PROMPTS)
    method = method._replace(rtol=1e-2, atol=1e-2) if isinstance(method, ode.Adaptive) else method
    options = {"steps": 4, "cfg": 2.0, "method": method}
    end = pipeline.sample(model.params, model.config, conditions, noise, transform=hold, **options)
    torch.testing.assert_close(end[..., :4], latents[..., :4], atol=1e-5, rtol=1e-5)
    assert (end[..., 4:] - latents[..., 4:]).abs().mean() > 0.1


def test_a_mask_of_all_is_generate_and_a_mask_of_nothing_the_image(model, images, right_half):
    everything, nothing = torch.ones_like(right_half), torch.zeros_like(right_half)
    back = pipeline.image_to_image(*parts(model), PROMPTS, images, prng.key(0), strength=0.0)
    for soften in (None, 0.0, 3.0):
        told = {"steps": 3, "soften": soften}
        drawn = pipeline.inpaint(*parts(model), PROMPTS, images, everything, prng.key(1), **told)
        assert torch.equal(drawn, pipeline.generate(*parts(model), PROMPTS, prng.key(1), steps=3))
        kept = pipeline.inpaint(*parts(model), PROMPTS, images, nothing, prng.key(1), **told)
        torch.testing.assert_close(kept, back, atol=1e-5, rtol=0)
        assert torch.equal(
            pipeline.inpaint(*parts(model), PROMPTS, images, nothing, prng.key(1), restore=True, **told), images
        )


def test_a_guidance_with_a_memory_paints_behind_a_mask_too(model, images, right_half):
    latents = pipeline.encode_images(model.params, model.config, images)
    noise, told = prng.normal(prng.key(7), latents.shape), {"steps": 3, "guidance": guidance.apg(3.0)}
    hold = pipeline.keep_masked(latents, noise, pipeline.unmask_times(right_half[..., ::8, ::8], schedule.sigmas(3)))
    conditions = pipeline.encode(*parts(model), PROMPTS)
    end = pipeline.sample(model.params, model.config, conditions, noise, transform=hold, **told)
    torch.testing.assert_close(end[..., :4], latents[..., :4], atol=1e-5, rtol=1e-5)
    drawn = pipeline.inpaint(*parts(model), PROMPTS, images, right_half, prng.key(1), restore=True, **told)
    assert torch.equal(drawn[..., :32], images[..., :32])
    plain = pipeline.inpaint(*parts(model), PROMPTS, images, right_half, prng.key(1), steps=3, restore=True, cfg=3.0)
    assert not torch.allclose(drawn, plain, atol=1e-3)


def test_grey_is_a_strength_of_its_own(model, images):
    grey = torch.full((1, 1, 64, 64), 0.5)
    told = {"steps": 6, "noise": prng.normal(prng.key(2), (2, 16, 8, 8))}
    painted = pipeline.inpaint(*parts(model), PROMPTS, images, grey, prng.key(0), soften=0.0, **told)
    expected = pipeline.image_to_image(*parts(model), PROMPTS, images, prng.key(0), strength=0.5, **told)
    torch.testing.assert_close(painted, expected, atol=1e-4, rtol=0)


@given(st.integers(1, 60), st.floats(0, 1))
def test_a_place_is_released_where_a_run_of_its_strength_would_start(steps, strength):
    grid = schedule.sigmas(steps)
    release = masks.unmask_times(torch.tensor([strength], dtype=torch.float64), grid)[0]
    times = schedule.partial(grid, strength)
    # The times at which it moves are those that the partial run takes a step from.
    assert int((grid[:-1] <= release).sum()) == len(times) - 1


@given(st.floats(0.7, 4), st.integers(1, 3))
def test_a_blur_keeps_constants_and_the_sum_of_what_lies_inside(sigma, rows):
    image = torch.zeros(1, 1, 40 + rows, 41)
    image[..., 20, 20] = 1
    blurred = masks.blurred(image, sigma)
    assert abs(float(blurred.sum()) - 1) < 1e-5 and torch.equal(blurred, blurred.flip(-1))
    spread = float((blurred[0, 0].sum(0) * (torch.arange(41) - 20.0).square()).sum())
    assert abs(spread - sigma**2) < 0.1 * sigma**2
    constant = torch.full((2, 1, 9, 7), 0.3)
    torch.testing.assert_close(masks.blurred(constant, sigma), constant)


def test_outpainting_keeps_the_image_and_continues_it_on_every_side(model, images):
    canvas, mask = pipeline.extend_canvas(images, left=16, right=32, top=0, bottom=16, overlap=8)
    assert canvas.shape == (2, 3, 80, 112) and mask.shape == (1, 1, 80, 112)
    assert torch.equal(canvas[..., :64, 16:80], images)
    assert torch.equal(canvas[..., :64, :16], images[..., :1].expand(-1, -1, -1, 16))
    kept = mask == 0
    assert kept[0, 0, :56, 24:72].all() and int(kept.sum()) == 56 * 48
    drawn = pipeline.outpaint(
        *parts(model), PROMPTS, images, prng.key(0), right=32, bottom=16, left=16, restore=True, steps=2
    )
    assert torch.equal(drawn[..., :64, 16:80], images)


def test_controls_are_heard_where_images_come_from_images(model, images, right_half):
    import dataclasses

    from functional_sd3.core import spec as specs
    from functional_sd3.transformer import controlnet

    names = ("heads", "head_dim", "context_width", "pooled_width", "position_size", "sample_size")
    config = controlnet.Config(depth=2, **{name: getattr(model.config.transformer, name) for name in names})
    leaf = lambda path, param: 0.1 * prng.normal(prng.key(len(path)), param.shape)  # noqa: E731
    net = specs.map_params(leaf, controlnet.spec(dataclasses.replace(config)))
    told = {"steps": 2, "cfg": 2.0}
    for name, draw in calls(model, images, right_half).items():
        size = (64, 96) if name == "tiled" else (64, 64)
        hints = torch.nn.functional.interpolate(images[1:], size)
        control = Control(net, config, pipeline.control_latents(model.params, model.config, hints, config))
        plain = draw(PROMPTS[:1], images[:1], prng.key(0), **told)
        heard = draw(PROMPTS[:1], images[:1], prng.key(0), control=[control], **told)
        assert (heard - plain).abs().max() > 0.01, name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x, m: pipeline.image_to_image(*p, "a", x, prng.key(0), strength=1.1), "strength 1.1 must be"),
        (lambda p, x, m: pipeline.image_to_image(*p, ["a"] * 3, x, prng.key(0)), "2 images for 3 prompts"),
        (lambda p, x, m: pipeline.image_to_image(*p, [], x[:1], prng.key(0)), "1 images for 0 prompts"),
        (lambda p, x, m: pipeline.image_to_image(*p, "a", x[:, 0], prng.key(0)), "must be .batch, 3, height, width"),
        (lambda p, x, m: pipeline.image_to_image(*p, "a", x[..., 8:], prng.key(0)), "width 56 is not a multiple of 16"),
        (lambda p, x, m: pipeline.inpaint(*p, "a", x, m[..., 1:], prng.key(0)), "mask of 63 x 64 for images"),
        (lambda p, x, m: pipeline.inpaint(*p, "a", x, m[0], prng.key(0)), "must be .batch or 1, 1, height, width"),
        (lambda p, x, m: pipeline.inpaint(*p, "a", x, m, prng.key(0), soften=-1.0), "a blur of -1.0 pixels"),
        (lambda p, x, m: pipeline.outpaint(*p, "a", x, prng.key(0), left=-16), "must be at least 0 pixels"),
        (lambda p, x, m: pipeline.outpaint(*p, "a", x, prng.key(0), left=16, overlap=32), "leaves nothing of"),
        (lambda p, x, m: pipeline.edit(*p, "a", "b", x, eta=2.0), "eta 2.0 must be between"),
        (lambda p, x, m: pipeline.edit(*p, "a", "b", x, window=(0.5, 0.2)), "window 0.5 to 0.2 must be"),
        (lambda p, x, m: pipeline.edit(*p, "a", "b", x, method="dopri5", inversion=fixed_point.inverse, steps=2),
         "dopri5 chooses its own steps, which cannot be undone"),
        (lambda p, x, m: pipeline.flow_edit(*p, "a", "b", x, prng.key(0), averages=0), "averages 0"),
        (lambda p, x, m: pipeline.interpolate(*p, "a", prng.key(0)), "8 frames between 1 stops"),
        (lambda p, x, m: pipeline.interpolate(*p, ["a", "b"], prng.split(prng.key(0), 3)), "3 keys for 2 prompts"),
        (lambda p, x, m: pipeline.tiles(8, 8), "overlap 8 must be at least 0 and below"),
        (lambda p, x, m: pipeline.regional(*p, "a", [], prng.key(0), guidance=guidance.apg(3.0)), "carries a state"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_named(model, images, right_half, call, message):
    with pytest.raises(ValueError, match=message):
        call(parts(model), images, right_half)
