"""Every transform of the public losses and of the velocity: per-sample gradients, forward mode, a gradcheck in t."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, jvp, vmap

from functional_sd3 import pipeline
from functional_sd3.core import attention, prng, transform, tree
from functional_sd3.image import vae
from functional_sd3.text import clip, conditioning, t5
from functional_sd3.training import objectives
from functional_sd3.transformer import controlnet, mmdit
from tests import models

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
BATCH = 3


@pytest.fixture(scope="module")
def model():
    return models.random_model(models.config(depth=2))


def drawn(*shape, seed=0, dtype=torch.float32):
    return prng.normal(prng.key(seed), shape, dtype)


def batch_of(model):
    sizes = model.config.transformer
    return {
        "latents": drawn(BATCH, 16, 8, 8, seed=1),
        "context": drawn(BATCH, 5, sizes.context_width, seed=2),
        "pooled": drawn(BATCH, sizes.pooled_width, seed=3),
    }


def one_by_one(loss, params, batch, keys):
    """Gradients of each sample alone, by a loop."""
    each = [
        grad(lambda params, rows: loss(params, rows[0], rows[1])[0])(
            params, tree.map(lambda leaf, index=index: leaf[index : index + 1], (batch, keys))
        )
        for index in range(BATCH)
    ]
    return tree.map(lambda *leaves: torch.stack(leaves), *each)


def mapped(loss, params, batch, keys):
    """The same by `vmap(grad)` of the public loss."""

    def sample(params, rows, key):
        return loss(params, tree.map(lambda leaf: leaf[None], rows), key[None])[0]

    return transform.per_sample_grads(sample)(params, batch, keys)


def close(ours, theirs):
    pairs = zip(tree.leaves(ours), tree.leaves(theirs), strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max() + 1)) for a, b in pairs)


def test_per_sample_gradients_of_the_flow_loss_are_those_of_a_loop(model):
    batch, keys = batch_of(model), prng.split(prng.key(4), BATCH)
    empty = {name: part[:1] for name, part in batch.items() if name != "latents"}
    loss = objectives.flow_loss(model.config, shift=2.0, dropout=0.5, empty=empty)
    params = {"transformer": model.params["transformer"]}
    assert close(mapped(loss, params, batch, keys), one_by_one(loss, params, batch, keys))
    # The metrics come out of the map too, each interval counted.
    _, metrics = vmap(lambda rows, key: loss(params, tree.map(lambda leaf: leaf[None], rows), key[None]))(batch, keys)
    assert torch.equal(metrics["bin_share"].sum(-1), torch.ones(BATCH))
    assert torch.equal(metrics["bin_share"].mean(0), loss(params, batch, keys)[1]["bin_share"])


def test_per_sample_gradients_go_through_the_text_encoders(model):
    ids = conditioning.tokenize(model.config, model.tokenizers, ["a red circle", "a blue star", "x"], t5_length=8)
    batch = {"latents": drawn(BATCH, 16, 8, 8, seed=1), "ids": ids}
    keys = prng.split(prng.key(4), BATCH)
    params = {name: part for name, part in model.params.items() if name != "vae"}
    loss = objectives.flow_loss(model.config)
    assert close(mapped(loss, params, batch, keys), one_by_one(loss, params, batch, keys))


def test_per_sample_gradients_of_the_vae_loss_are_those_of_a_loop(model):
    batch = {"images": drawn(BATCH, 3, 16, 16).tanh()}
    keys = prng.split(prng.key(4), BATCH)
    loss = objectives.vae_loss(model.config.vae, edges=0.1)
    params = model.params["vae"]
    assert close(mapped(loss, params, batch, keys), one_by_one(loss, params, batch, keys))


@pytest.mark.parametrize("name", ["flow", "vae"])
def test_the_forward_derivative_of_a_loss_is_its_gradients_product(model, name):
    keys = prng.split(prng.key(4), BATCH)
    if name == "flow":
        loss, batch = objectives.flow_loss(model.config), batch_of(model)
        params = {"transformer": model.params["transformer"]}
    else:
        loss, params = objectives.vae_loss(model.config.vae, edges=0.1), model.params["vae"]
        batch = {"images": drawn(BATCH, 3, 16, 16).tanh()}
    tangent = tree.map(lambda leaf: 0.1 * leaf.cos(), params)
    run = lambda params: loss(params, batch, keys)[0]  # noqa: E731
    _, forward = jvp(run, (params,), (tangent,))
    products = [(a * b).sum() for a, b in zip(tree.leaves(grad(run)(params)), tree.leaves(tangent), strict=True)]
    torch.testing.assert_close(forward, sum(products), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def fields(model):
    """name -> (a function of latents that takes implementation=, an input)."""
    params, config = model.params, model.config
    sizes, t = config.transformer, torch.tensor([0.4])
    context, pooled = drawn(1, 5, sizes.context_width, seed=2), drawn(1, sizes.pooled_width, seed=3)
    arguments = conditioning.Conditioning(context, pooled)
    net = controlnet.Config(
        depth=1, heads=2, head_dim=16, context_width=sizes.context_width, pooled_width=sizes.pooled_width,
        position_size=12, sample_size=8,
    )  # fmt: skip
    own = tree.map(lambda leaf: leaf + 0.01, controlnet.init(prng.key(0), net))
    ids, table = torch.arange(8)[None], "embedding"

    def text(embedding, **options):
        return t5.apply({**params["t5"], table: {"weight": embedding}}, config.t5, ids, **options)

    def words(embedding, **options):
        weights = {**params["clip_l"], "token_embedding": {"weight": embedding}}
        return clip.apply(weights, config.clip_l, ids, **options).pooled

    def velocity(x, **options):
        return pipeline.velocity(params, config, pipeline.Conditions(arguments, arguments), 3.0, **options)(x, t[0])

    def loss(x, **options):
        batch = {"latents": x, "context": context, "pooled": pooled}
        return objectives.flow_loss(config, **options)(params, batch, prng.split(prng.key(4), 1))[0]

    def attend(x, **options):
        return attention.attention(x, x, x, **options)

    x = drawn(1, 16, 8, 8, seed=1)
    return {
        "attention": (attend, drawn(1, 2, 6, 8)),
        "mmdit": (lambda x, **options: mmdit.apply(params["transformer"], sizes, x, t, context, pooled, **options), x),
        "controlnet": (
            lambda x, **options: controlnet.apply(own, net, x, t, context, pooled, x, **options)[0], x
        ),
        "pipeline.velocity": (velocity, x),
        "flow_loss": (loss, x),
        "vae.encode": (
            lambda x, **options: vae.encode(params["vae"], config.vae, x, **options).mean, drawn(1, 3, 16, 16)
        ),
        "vae.decode": (
            lambda x, **options: vae.decode(params["vae"], config.vae, x, **options), drawn(1, 16, 2, 2)
        ),
        "t5": (text, params["t5"][table]["weight"]),
        "clip": (words, params["clip_l"]["token_embedding"]["weight"]),
    }  # fmt: skip


NAMES = ["attention", "mmdit", "controlnet", "pipeline.velocity", "flow_loss", "vae.encode", "vae.decode", "t5", "clip"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["jvp", "dual numbers"])
def test_forward_derivatives_equal_differences(fields, name, way):
    run, x = fields[name]

    def forward(**options):
        if way == "jvp":
            return jvp(lambda x: run(x, **options), (x,), (x.cos(),))[1]
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(run(forward_ad.make_dual(x, x.cos()), **options)).tangent

    derivative = forward()
    torch.testing.assert_close(derivative, forward(implementation="math"), rtol=1e-3, atol=1e-4)
    step = 1e-3
    ahead, behind = (run(x + sign * step * x.cos()) for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    assert (derivative - expected).norm() <= 0.03 * expected.norm()


def test_attention_of_integers_is_an_error():
    with pytest.raises((NotImplementedError, RuntimeError)):
        attention.attention(*(torch.zeros(1, 1, 2, 4, dtype=torch.int64) for _ in range(3)))


def test_t_is_embedded_in_the_models_dtype_where_it_is_wider(model):
    params = tree.cast(model.params["transformer"], torch.float64)
    sizes = model.config.transformer
    x, context, pooled = (drawn(*shape, seed=1, dtype=torch.float64) for shape in (
        (1, 16, 4, 4), (1, 3, sizes.context_width), (1, sizes.pooled_width)))  # fmt: skip
    t = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    for implementation in ("sdpa", "math"):
        run = lambda t: mmdit.apply(params, sizes, x, t, context, pooled, implementation=implementation)  # noqa: B023, E731
        assert torch.autograd.gradcheck(run, (t,), check_forward_ad=True, fast_mode=True)
    # And in float32 in a model of fewer bits, where t = 0.3 itself would be rounded.
    narrow = tree.cast(model.params["transformer"], torch.bfloat16)
    near = mmdit.modulations(narrow, sizes, torch.tensor([0.3]), pooled.float())["final"]
    exact = mmdit.modulations(model.params["transformer"], sizes, torch.tensor([0.3]), pooled.float())["final"]
    assert (near - exact).norm() < 0.03 * exact.norm()


def test_the_velocity_of_a_pipeline_is_the_same_by_either_attention(fields):
    run, x = fields["pipeline.velocity"]
    torch.testing.assert_close(run(x), run(x), rtol=1e-4, atol=1e-5)
