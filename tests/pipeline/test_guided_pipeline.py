"""Guidance in whole runs: what each costs in evaluations of the network, and that it is what its parts make."""

import pytest
import torch

from functional_sd3 import pipeline
from functional_sd3.core import prng, tree
from functional_sd3.flow import guidance, ode
from functional_sd3.transformer import mmdit
from tests import models
from tests.models import parts

PROMPTS = ["a red circle", "a blue star"]
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def conditions(model):
    return pipeline.encode(*parts(model), PROMPTS)


@pytest.fixture(scope="module")
def noise(model):
    return pipeline.initial_noise(prng.key(2), model.config, 2)


@pytest.fixture
def calls(monkeypatch):
    """(rows, blocks skipped, blocks perturbed) of each evaluation of the transformer."""
    evaluated, apply = [], mmdit.apply

    def counted(params, config, latents, *arguments, skip_layers=(), perturbed_layers=(), **options):
        evaluated.append((len(latents), tuple(skip_layers), tuple(perturbed_layers)))
        options |= {"skip_layers": skip_layers, "perturbed_layers": perturbed_layers}
        return apply(params, config, latents, *arguments, **options)

    monkeypatch.setattr(mmdit, "apply", counted)
    return evaluated


def sample(model, conditions, noise, guiding=None, **options):
    options = {"steps": 4, **options}
    with torch.no_grad():
        return pipeline.sample(model.params, model.config, conditions, noise, guidance=guiding, **options)


def test_without_a_guidance_it_is_classifier_free_to_the_bit(model, conditions, noise):
    plain = sample(model, conditions, noise, cfg=4.0)
    assert torch.equal(sample(model, conditions, noise, guidance.cfg(4.0)), plain)
    assert torch.equal(sample(model, conditions, noise, guidance.cfg(4.0), cfg=9.0), plain)
    assert not torch.equal(sample(model, conditions, noise, guidance.cfg(4.5)), plain)


TWO, ONE = (4, (), ()), (2, (), ())


@pytest.mark.parametrize(
    ("guiding", "expected"),
    [
        (None, [TWO] * 4),
        (guidance.cfg(1.0), [ONE] * 4),
        (guidance.rescaled(guidance.zero_star(5.0)), [TWO] * 4),
        (guidance.apg(5.0), [TWO] * 4),
        (guidance.tangential(5.0), [TWO] * 4),
        (guidance.interval(guidance.cfg(5.0), 0.25, 0.75), [ONE, TWO, TWO, ONE]),
        (guidance.zero_init(guidance.zero_star(5.0)), [TWO] * 3),
        (
            guidance.skip_layer(guidance.cfg(5.0), (0, 2), 2.0, 0.0, 0.6),
            [TWO, TWO, (2, (0, 2), ()), TWO, (2, (0, 2), ()), TWO],
        ),
        (guidance.perturbed(guidance.cfg(5.0), (1,)), [TWO, (2, (), (1,))] * 4),
        (guidance.perturbed(guidance.CONDITIONAL, (1,), stop=0.5), [ONE, (2, (), (1,))] * 2 + [ONE] * 2),
        (guidance.smoothed(guidance.perturbed(guidance.cfg(5.0), (1,)), (1,)), [TWO, *[(2, (), (1,))] * 2] * 4),
    ],
)
def test_a_step_evaluates_what_it_needs_and_no_more(model, conditions, noise, calls, guiding, expected):
    sample(model, conditions, noise, guiding)
    assert calls == expected


def test_modulations_are_computed_once_for_equal_conditionings(model, conditions, noise, monkeypatch):
    made, modulations = [], mmdit.modulations
    monkeypatch.setattr(mmdit, "modulations", lambda *given: made.append(given[2].shape[0]) or modulations(*given))
    sample(model, conditions, noise, guidance.smoothed(guidance.perturbed(guidance.cfg(5.0), (1,)), (2,)))
    assert made == [4, 4]


def plainly(model, conditioning, **options):
    def velocity(x, t):
        return mmdit.apply(model.params["transformer"], model.config.transformer, x, t, *conditioning, **options)

    return velocity


@pytest.mark.parametrize("method", ["euler", "heun_edm", "dpmpp_2m"])
def test_a_guided_run_is_that_of_the_velocities_evaluated_one_by_one(model, conditions, noise, method):
    guiding = guidance.rescaled(guidance.perturbed(guidance.zero_star(5.0), (1,), 1.5), 0.5)
    fields = {
        "positive": plainly(model, conditions.positive),
        "negative": plainly(model, conditions.negative),
        "perturbed_layers (1,)": plainly(model, conditions.positive, perturbed_layers=(1,)),
    }
    times = pipeline.sigmas(model.config, noise, 3)
    with torch.no_grad():
        expected = ode.integrate(ode.METHODS[method], guidance.guided(guiding, fields), noise, times)
    actual = sample(model, conditions, noise, guiding, steps=3, method=ode.METHODS[method])
    close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["euler", "dpmpp_2m"])
def test_a_run_split_by_windows_is_its_steps_one_after_the_other_with_their_carry(model, conditions, noise, method):
    guiding = guidance.skip_layer(guidance.apg(5.0, longest=8.0), (1,), 1.5, 0.1, 0.7)
    fields = {
        "positive": plainly(model, conditions.positive),
        "negative": plainly(model, conditions.negative),
        "skip_layers (1,)": plainly(model, conditions.positive, skip_layers=(1,)),
    }
    times, method = pipeline.sigmas(model.config, noise, 5), ode.METHODS[method]
    runner = guidance.with_carry(method, guiding)
    state = ode.start(runner, noise, times[0])
    with torch.no_grad():
        for step in range(5):
            velocity = guidance.guided_with_carry(guidance.at(guiding, step, 5), fields)
            state = ode.run(runner, velocity, state, times[step : step + 2], ends=step == 4)
    steps = []
    actual = sample(
        model, conditions, noise, guiding, steps=5, method=method, on_step=lambda info: steps.append(info.index)
    )
    close(actual, state.x, atol=1e-4, rtol=1e-4)
    assert steps == [0, 1, 2, 3, 4]


def test_a_guided_image_does_not_depend_on_its_batch(model):
    keys = prng.split(prng.key(1), 2)
    for guiding in (guidance.apg(5.0), guidance.rescaled(guidance.perturbed(guidance.tangential(5.0), (1,)))):
        batched = pipeline.generate(*parts(model), PROMPTS, keys, steps=3, guidance=guiding)
        for i in range(2):
            alone = pipeline.generate(*parts(model), PROMPTS[i], keys[i : i + 1], steps=3, guidance=guiding)
            close(alone[0], batched[i], atol=1e-4, rtol=0)


def test_a_weaker_model_guides_by_its_difference(model, conditions, noise):
    weak = tree.map(lambda leaf: 0.9 * leaf, model.params["transformer"])
    times = torch.tensor([0.7])
    auto = pipeline.velocity(model.params, model.config, conditions, times=times, guidance=guidance.auto(2.0, weak))
    strong, weaker = (
        mmdit.apply(params, model.config.transformer, noise, times[0], *conditions.positive)
        for params in (model.params["transformer"], weak)
    )
    close(auto(noise, times[0]), weaker + 2 * (strong - weaker), atol=1e-4, rtol=1e-4)
    itself = guidance.auto(2.0, model.params["transformer"], model.config.transformer)
    of_itself = pipeline.velocity(model.params, model.config, conditions, guidance=itself)
    close(of_itself(noise, times[0]), strong, atol=1e-4, rtol=1e-4)


def test_a_prompt_may_be_composed_of_several(model, conditions, noise, calls):
    prompt = pipeline.encode(*parts(model), ["a green ring"]).positive
    guiding = guidance.composed(guidance.cfg(3.0), (prompt, 2.0))
    actual = pipeline.velocity(model.params, model.config, conditions, guidance=guiding)(noise, torch.tensor(0.4))
    assert calls == [(6, (), ())]
    each = [part.expand(2, *part.shape[1:]) for part in prompt]
    positive, negative, other = (
        mmdit.apply(model.params["transformer"], model.config.transformer, noise, torch.tensor(0.4), *of)
        for of in (conditions.positive, conditions.negative, each)
    )
    close(actual, negative + 3 * (positive - negative) + 2 * (other - negative), atol=1e-4, rtol=1e-4)
    short = prompt._replace(context=prompt.context[:, :5])
    with pytest.raises(ValueError, match="differ in their number of tokens.*'prompt 1': 5"):
        pipeline.velocity(
            model.params, model.config, conditions, guidance=guidance.composed(guidance.cfg(3.0), (short, 2.0))
        )


def test_an_image_is_differentiable_in_the_numbers_of_its_guidance(model, noise):
    numbers = torch.tensor([4.0, -0.5, 0.3, 6.0, 1.5, 0.4], requires_grad=True)
    scale, momentum, eta, longest, more, factor = numbers.unbind()
    guiding = guidance.apg(scale, momentum=momentum, eta=eta, longest=longest)
    guiding = guidance.rescaled(guidance.perturbed(guiding, (1,), more), factor)
    image = pipeline.generate(*parts(model), PROMPTS, prng.key(0), noise=noise, guidance=guiding, steps=2)
    (gradient,) = torch.autograd.grad(image.square().mean(), numbers)
    assert torch.isfinite(gradient).all() and (gradient.abs() > 1e-9).all()


def test_a_guided_velocity_compiles_to_one_graph(conditions, noise):
    shallow = models.random_model(models.config(depth=1))

    def velocity(scale, x, t):
        guiding = guidance.rescaled(guidance.perturbed(guidance.zero_star(scale), (0,), 1.5))
        return pipeline.velocity(shallow.params, shallow.config, conditions, guidance=guiding)(x, t)

    given = torch.tensor([3.0, 5.0]), noise, torch.tensor(0.4)
    close(torch.compile(velocity, fullgraph=True, backend="eager")(*given), velocity(*given))


def test_adaptive_methods_take_guidance_in_windows_but_none_with_a_carry(model, conditions, noise):
    limited = guidance.interval(guidance.zero_star(5.0), 0.25, 1.0)
    loose = ode.BOSH3._replace(rtol=1e-1, atol=1e-1)
    assert sample(model, conditions, noise[:, :, :4, :4], limited, steps=4, method=loose).isfinite().all()
    with pytest.raises(ValueError, match="may reject steps"):
        sample(model, conditions, noise, guidance.apg(5.0), method=ode.DOPRI5)
    with pytest.raises(ValueError, match="carries a state"):
        pipeline.velocity(model.params, model.config, conditions, guidance=guidance.apg(5.0))
    with pytest.raises(ValueError, match="a field of its own"):
        sample(model, conditions, noise, guidance.apg(5.0), field=pipeline.velocity)


def test_a_time_that_the_modulations_were_not_made_for_is_an_error(model, conditions, noise):
    times = torch.tensor([1.0, 0.5])
    velocity = pipeline.velocity(model.params, model.config, conditions, times=times)
    close(velocity(noise, times[1]), pipeline.velocity(model.params, model.config, conditions)(noise, times[1]))
    with pytest.raises(ValueError, match=r"evaluated at t = 0\.25, which is not among the 2 times"):
        velocity(noise, torch.tensor(0.25))


@pytest.mark.parametrize("make", [ode.flow_sde, ode.cps, ode.dance])
def test_samplers_of_the_sde_draw_eulers_images_without_noise_and_record_log_probabilities(
    model, conditions, noise, make
):
    keys = pipeline.step_keys(prng.key(4), 2)
    assert torch.equal(sample(model, conditions, noise, method=make(keys, 0.0)), sample(model, conditions, noise))
    recorded = []
    latents = sample(
        model, conditions, noise, guidance.apg(3.0), method=ode.with_log_prob(make(keys)),
        on_step=lambda info: recorded.append(info.state.carry["method"]["log_prob"]),
    )  # fmt: skip
    assert torch.equal(latents, sample(model, conditions, noise, guidance.apg(3.0), method=make(keys)))
    assert len(recorded) == 4 and all(value.shape == (2,) and value.isfinite().all() for value in recorded)
    assert (torch.stack(recorded)[:3] != 0).all()
