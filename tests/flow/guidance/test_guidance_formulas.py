"""What each guidance makes of velocities: closed forms, and laws that hold for all of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.flow import guidance
from functional_sd3.flow.guidance import combine as formulas
from functional_sd3.flow.path import denoised
from tests.flow.guidance.guidances import ALL, BASES, CONDITIONING, MORE, combine, point, velocities

SEEDS = st.integers(0, 2**31 - 1)
SCALES = st.floats(-5, 15)
close = torch.testing.assert_close


def both(seed):
    by_name = velocities(seed)
    return by_name, by_name["negative"], by_name["positive"]


def dot(a, b):
    return (a * b).flatten(1).sum(1)


@pytest.mark.parametrize("name", [name for name in BASES if name != "apg of diffusers"])
@given(seed=SEEDS)
@settings(max_examples=8)
def test_scale_one_is_the_velocity_of_the_prompt(name, seed):
    by_name, x_t = velocities(seed), point(seed)
    close(combine(BASES[name](torch.tensor(1.0)), by_name, *x_t), by_name["positive"])
    assert BASES[name](1) is guidance.CONDITIONAL and BASES[name](1.0) is guidance.CONDITIONAL


@pytest.mark.parametrize("name", MORE)
@given(seed=SEEDS)
@settings(max_examples=8)
def test_scale_zero_adds_nothing(name, seed):
    by_name, x_t = velocities(seed), point(seed)
    base = guidance.zero_star(4.0) if name == "perturbed" else guidance.cfg(4.0)
    assert torch.equal(combine(MORE[name](0.0), by_name, *x_t), combine(base, by_name, *x_t))


@pytest.mark.parametrize("name", [name for name in ALL if name != "magnitude_aware"])
@given(seed=SEEDS, first=SCALES, second=SCALES)
@settings(max_examples=8)
def test_the_velocity_is_linear_in_the_scale(name, seed, first, second):
    first, second = (torch.tensor(s) for s in ((first, second) if name != "rescaled" else (0.2, 0.9)))
    by_name, x_t = velocities(seed), point(seed)
    at = lambda scale: combine(ALL[name](scale), by_name, *x_t)  # noqa: E731
    start, end = at(torch.tensor(0.0)), at(torch.tensor(1.0))
    for scale in (first, second, first + second if name != "rescaled" else first):
        close(at(scale), start + scale * (end - start), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_a_sample_does_not_depend_on_its_batch_and_may_have_a_scale_of_its_own(name):
    by_name, (x, t) = velocities(7), point(7)
    scales = torch.tensor([0.2, 0.5, 0.9]) if name == "rescaled" else torch.tensor([0.0, 1.5, 7.0])
    batched = combine(ALL[name](scales), by_name, x, t)
    each = combine(ALL[name](scales), by_name, x, torch.tensor([0.6, 0.6, 0.6]))
    close(each, batched)
    for i, scale in enumerate(scales.tolist()):
        alone = {name: value[i : i + 1] for name, value in by_name.items()}
        close(combine(ALL[name](scale), alone, x[i : i + 1], t), batched[i : i + 1])


@pytest.mark.parametrize("name", ALL)
def test_scales_may_be_mapped_differentiated_and_compiled(name):
    by_name, x_t = velocities(8), point(8)
    scales = torch.tensor([0.1, 0.4, 0.8])
    at = lambda scale: combine(ALL[name](scale), by_name, *x_t)  # noqa: E731
    expected = torch.stack([at(scale) for scale in scales])
    torch._dynamo.reset()
    close(torch.func.vmap(at)(scales), expected)
    close(torch.compile(at, fullgraph=True, backend="eager")(scales[1]), expected[1])
    slope = torch.func.jacrev(at)(scales[1].double()), torch.func.jacfwd(at)(scales[1].double())
    step = (at(scales[1].double() + 1e-3) - at(scales[1].double() - 1e-3)) / 2e-3
    for actual in slope:
        close(actual.float(), step.float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ALL)
def test_velocities_in_bfloat16_are_combined_in_float32(name):
    by_name, x_t = velocities(9), point(9)
    low = {name: value.bfloat16() for name, value in by_name.items()}
    exact = {name: value.float() for name, value in low.items()}
    scale = 0.5 if name == "rescaled" else 5.0
    assert torch.equal(combine(ALL[name](scale), low, *x_t), combine(ALL[name](scale), exact, *x_t))


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_is_finite_where_velocities_vanish_or_agree(name):
    zero, same = torch.zeros(2, 3, 4), torch.linspace(-1, 1, 12).reshape(1, 3, 4).expand(2, 3, 4)
    for positive, negative in ((zero, zero), (same, same), (zero, same), (same, zero)):
        by_name = dict.fromkeys(velocities(0), negative) | {"positive": positive}

        def loss(by_name):
            return combine(ALL[name](torch.tensor(0.5)), by_name, zero, torch.tensor(0.5)).square().sum()

        gradients = torch.func.grad(loss)(by_name)
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@given(seed=SEEDS, factor=st.floats(-4, 4).filter(lambda k: abs(k) > 0.1))
@settings(max_examples=20)
def test_zero_star_starts_from_the_projection_onto_the_negative_velocity_whatever_its_length(seed, factor):
    by_name, negative, positive = both(seed)
    start = formulas.project_onto(negative, positive)
    close(dot(positive - start, negative), torch.zeros(3), atol=1e-3, rtol=0)
    close(combine(guidance.zero_star(0.0), by_name, *point(seed)), start)
    longer = {**by_name, "negative": factor * negative}
    close(
        combine(guidance.zero_star(5.0), longer, *point(seed)),
        combine(guidance.zero_star(5.0), by_name, *point(seed)),
        atol=1e-4,
        rtol=1e-4,
    )


@given(seed=SEEDS)
@settings(max_examples=20)
def test_the_tangent_is_the_projection_onto_the_first_singular_vector(seed):
    _, negative, positive = both(seed)
    _, _, right = torch.linalg.svd(torch.stack([positive, negative], 1).flatten(2).double(), full_matrices=False)
    first = right[:, 0]
    expected = (negative.flatten(1).double() * first).sum(1, keepdim=True) * first
    close(formulas.tangential_component(negative, positive).flatten(1), expected.float(), atol=1e-5, rtol=1e-5)
    close(formulas.tangential_component(0.3 * positive, positive), 0.3 * positive, atol=1e-5, rtol=1e-4)


@given(seed=SEEDS, scale=SCALES)
@settings(max_examples=20)
def test_projected_guidance_without_its_three_changes_is_classifier_free(seed, scale):
    by_name, x_t = velocities(seed), point(seed)
    expected = combine(guidance.cfg(torch.tensor(scale)), by_name, *x_t)
    for form in ({}, {"from_positive": True}, {"of_data": True}, {"from_positive": True, "of_data": True}):
        plain = guidance.apg(torch.tensor(scale), momentum=0, eta=1.0, longest=None, **form)
        close(combine(plain, by_name, *x_t), expected, atol=1e-4, rtol=1e-4)
        end = torch.tensor(0.0)
        close(combine(plain, by_name, x_t[0], end), expected, atol=1e-4, rtol=1e-4)


@given(seed=SEEDS, longest=st.floats(0.1, 20))
@settings(max_examples=20)
def test_the_projected_update_is_orthogonal_to_the_prompts_prediction_and_not_too_long(seed, longest):
    by_name, negative, positive = both(seed)
    x, t = point(seed)
    update = combine(guidance.apg(2.0, momentum=0, longest=longest), by_name, x, t) - negative
    close(dot(update, positive) / dot(positive, positive), torch.zeros(3), atol=1e-4, rtol=0)
    assert (dot(update, update).sqrt() <= 2 * longest + 1e-3).all()
    of_data = combine(guidance.apg(2.0, momentum=0, longest=longest, of_data=True), by_name, x, t)
    update = denoised(x, of_data, t) - denoised(x, negative, t)
    data = denoised(x, positive, t)
    close(dot(update, data) / dot(data, data), torch.zeros(3), atol=1e-4, rtol=0)
    assert (dot(update, update).sqrt() <= 2 * longest + 1e-3).all()


def test_the_limit_shortens_what_is_longer_and_nothing_else():
    long = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    close(formulas.clip_norm(long, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    close(formulas.clip_norm(long, torch.tensor([2.5, 0.1, 1.0])), torch.tensor([[1.5, 2], [0.06, 0.08], [0, 0]]))


@given(seed=SEEDS, scale=SCALES, rate=st.floats(0, 10))
@settings(max_examples=20)
def test_magnitude_aware_guidance_is_classifier_free_with_less_scale_where_much_would_change(seed, scale, rate):
    by_name, negative, positive = both(seed)
    ratio = (positive - negative).flatten(1).norm(dim=1) / negative.flatten(1).norm(dim=1)
    less = 1 + (scale - 1) * torch.exp(-rate * ratio)
    actual = combine(guidance.magnitude_aware(torch.tensor(scale), rate), by_name, *point(seed))
    close(actual, combine(guidance.cfg(less), by_name, *point(seed)), atol=1e-4, rtol=1e-4)


@given(seed=SEEDS, scale=SCALES)
@settings(max_examples=20)
def test_rescaled_velocities_have_the_deviation_of_the_prompts_and_the_direction_they_had(seed, scale):
    by_name, x_t = velocities(seed), point(seed)
    v = combine(guidance.cfg(torch.tensor(scale)), by_name, *x_t)
    whole = combine(guidance.rescaled(guidance.cfg(torch.tensor(scale)), 1.0), by_name, *x_t)
    close(whole.flatten(1).std(1), by_name["positive"].flatten(1).std(1))
    close(dot(whole, v), dot(whole, whole).sqrt() * dot(v, v).sqrt(), rtol=1e-4, atol=1e-4)
    half = combine(guidance.rescaled(guidance.cfg(torch.tensor(scale)), 0.5), by_name, *x_t)
    close(half, (v + whole) / 2, rtol=1e-4, atol=1e-4)


@given(seed=SEEDS, weights=st.lists(SCALES, min_size=1, max_size=3))
@settings(max_examples=20)
def test_prompts_compose_by_a_sum_of_their_differences_in_any_order(seed, weights):
    by_name, negative, _ = both(seed)
    further = [velocities(seed + 1 + i)["positive"] for i in range(len(weights))]
    expected = combine(guidance.cfg(3.0), by_name, *point(seed))
    expected = expected + sum(weight * (v - negative) for weight, v in zip(weights, further, strict=True))
    for order in (list(range(len(weights))), list(reversed(range(len(weights))))):
        composed = guidance.composed(guidance.cfg(3.0), *((object(), weights[i]) for i in order))
        named = {f"prompt {place + 1}": further[i] for place, i in enumerate(order)}
        close(combine(composed, {**by_name, **named}, *point(seed)), expected, atol=1e-4, rtol=1e-4)


def test_a_prompt_composed_with_nothing_is_classifier_free_guidance_of_it():
    by_name, x_t = velocities(4), point(4)
    of_prompt = combine(guidance.composed(guidance.cfg(0.0), (CONDITIONING, 6.0)), by_name, *x_t)
    close(of_prompt, combine(guidance.cfg(6.0), {**by_name, "positive": by_name["prompt 1"]}, *x_t))


def test_guidance_away_from_something_worse_adds_the_difference_to_the_velocity():
    by_name, x_t = velocities(5), point(5)
    base = combine(guidance.cfg(4.0), by_name, *x_t)
    for name, worse in (("skip_layer", "skip_layers (1,)"), ("smoothed", "perturbed_layers (1,) perturbation")):
        close(combine(MORE[name](2.5), by_name, *x_t), base + 2.5 * (by_name["positive"] - by_name[worse]))


def test_guidance_of_other_things_are_of_other_names_and_of_one_thing_of_one():
    twice = guidance.perturbed(guidance.perturbed(guidance.cfg(4.0), (1,), 1.0), (1, 2), 2.0)
    assert len(twice.needs) == 4
    assert len(guidance.perturbed(guidance.perturbed(guidance.cfg(4.0), (1,), 1.0), [1], 2.0).needs) == 3
    weak = guidance.Branch(model=({}, None))
    with pytest.raises(ValueError, match="two velocities by the name 'weak'"):
        guidance.plus(guidance.auto(2.0, {}), 1.0, {"positive": guidance.POSITIVE}, {"weak": weak})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: guidance.rescaled(guidance.cfg(4.0), 1.5), r"factor 1.5 of rescaled guidance must be in \[0, 1\]"),
        (lambda: guidance.apg(4.0, longest=0.0), "longest 0.0 of adaptive projected guidance must be above 0"),
        (lambda: guidance.smoothed(guidance.cfg(4.0), (1,), sigma=0), "sigma 0 of smoothed energy guidance"),
        (lambda: guidance.skip_layer(guidance.cfg(4.0), ()), "needs the index of one block at least"),
        (lambda: guidance.mixed_apg(4.0, momentum=0), "mixed_apg needs a momentum that is not 0"),
        (lambda: guidance.guided(guidance.cfg(2.0), {"positive": None}), r"there is none for \['negative'\]"),
    ],
)
def test_what_makes_no_sense_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
