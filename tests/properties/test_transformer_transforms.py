"""The MMDiT under every transform: derivatives in both modes, vmap, per-sample gradients, Hessians, compilation."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, grad_and_value, jvp, vjp, vmap

from functional_sd3.core import prng, transform, tree
from functional_sd3.core import spec as specs
from functional_sd3.transformer import mmdit
from tests import models

# torch itself scripts its forward-mode derivatives, and parts of its compiler, when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

CONFIG = models.transformer_config(depth=2, position_size=12, sample_size=12, qk_norm=True, dual_attention_layers=(0,))
BATCH = 4


@pytest.fixture(autouse=True)
def slow_vmap_loops_are_errors():
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


@pytest.fixture(scope="module")
def params():
    def leaf(path, param):
        if not param.trainable:
            return param.init(prng.key(0), param.shape)
        return random(0, param.shape) * 0.2 + (1.0 if "_norm" in path else 0.0)

    return specs.map_params(leaf, mmdit.spec(CONFIG))


def random(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_inputs(height=4, width=6, tokens=3, batch=BATCH):
    latents, context = random(1, (batch, 2, height, width)), random(2, (batch, tokens, 6))
    return latents, torch.linspace(0.1, 0.9, batch), context, random(3, (batch, 5))


def velocity(params, *inputs):
    return mmdit.apply(params, CONFIG, *inputs)


def loss(params, latents, *conditions):
    return (velocity(params, latents, *conditions) - latents).square().mean()


def formula_loss(params, latents, *conditions):
    out = mmdit.apply(params, CONFIG, latents, *conditions, implementation="math")
    return (out - latents).square().mean()


def close(first, second, rtol=1e-4, atol=1e-5):
    return not tree.diff(first, second, rtol=rtol, atol=atol)


def test_jvp_equals_finite_differences(params):
    latents, t, context, pooled = random_inputs()
    tangents = random(4, latents.shape), torch.ones_like(t) / 100, random(5, context.shape), random(6, pooled.shape)

    def along(step):
        moved = (x + step * dx for x, dx in zip((latents, t, context, pooled), tangents, strict=True))
        return velocity(params, *moved)

    _, derivative = jvp(lambda *inputs: velocity(params, *inputs), (latents, t, context, pooled), tangents)
    step = 1e-2
    differences = (8 * (along(step) - along(-step)) - (along(2 * step) - along(-2 * step))) / (12 * step)
    assert (derivative - differences).norm() <= 1e-2 * derivative.norm()


def test_vjp_is_the_transpose_of_jvp(params):
    inputs = random_inputs()
    tangents = [tree.map(lambda leaf: random(7, leaf.shape), params), *(random(8, x.shape) for x in inputs)]
    out, pushed = jvp(velocity, (params, *inputs), tuple(tangents))
    cotangent = random(9, out.shape)
    pulled = vjp(velocity, params, *inputs)[1](cotangent)
    inner = sum((a * b).sum() for a, b in zip(tree.leaves(tangents), tree.leaves(list(pulled)), strict=True))
    assert torch.allclose((pushed * cotangent).sum(), inner, rtol=1e-3)


def test_gradients_of_both_implementations_of_attention_are_equal(params):
    inputs = random_inputs()
    assert close(grad(loss)(params, *inputs), grad(formula_loss)(params, *inputs))
    tangents = tree.map(torch.cos, params)
    ours, formula = (
        transform.hvp(lambda params, of=of: of(params, *inputs), params, tangents) for of in (loss, formula_loss)
    )
    assert close(ours, formula)


def test_vmap_over_samples_equals_the_batch(params):
    def one(*sample):
        return velocity(params, *(part[None] for part in sample))[0]

    assert close(vmap(one)(*random_inputs()), velocity(params, *random_inputs()))


def test_vmap_over_parameters_equals_each_network_alone(params):
    other = tree.map(lambda leaf: leaf * 0.9, params)
    stacked = tree.map(lambda *leaves: torch.stack(leaves), params, other)
    both = vmap(velocity, in_dims=(0, None, None, None, None))(stacked, *random_inputs())
    assert close(both, torch.stack([velocity(one, *random_inputs()) for one in (params, other)]))


def test_per_sample_gradients_equal_a_loop(params):
    inputs = random_inputs()

    def sample_loss(params, *sample):
        return loss(params, *(part[None] for part in sample))

    mapped = transform.per_sample_grads(sample_loss)(params, *inputs)
    looped = [grad(loss)(params, *(part[i : i + 1] for part in inputs)) for i in range(BATCH)]
    assert close(mapped, tree.map(lambda *leaves: torch.stack(leaves), *looped))


def test_hessian_vector_products_equal_differences_of_gradients(params):
    inputs = random_inputs()
    tangents = tree.map(lambda leaf: random(10, leaf.shape), params)
    product = transform.hvp(lambda params: loss(params, *inputs), params, tangents)
    ahead, behind = (
        grad(loss)(tree.map(lambda leaf, move, s=step: leaf + s * move, params, tangents), *inputs)
        for step in (1e-3, -1e-3)
    )
    difference = tree.map(lambda a, b: (a - b) / 2e-3, ahead, behind)
    error = sum((a - b).square().sum() for a, b in zip(tree.leaves(product), tree.leaves(difference), strict=True))
    assert error <= 1e-3 * sum(leaf.square().sum() for leaf in tree.leaves(product))


def test_both_paths_to_gradients_are_equal_and_remat_with_them(params):
    inputs = random_inputs()
    plain = grad_and_value(loss)(params, *inputs)
    assert close(plain[0], transform.value_and_grad(loss)(params, *inputs)[0])

    def remat_loss(params, latents, *conditions):
        out = mmdit.apply(params, CONFIG, latents, *conditions, block_transform=transform.remat)
        return (out - latents).square().mean()

    assert close(plain[0], transform.value_and_grad(remat_loss)(params, *inputs)[0])


@pytest.fixture
def last_block_alone(params):
    """A loss and its parameters: the last block has nearly all there is to compile, in half the time of two."""
    config = mmdit.Config(**{**vars(CONFIG), "depth": 1, "dual_attention_layers": ()})

    def loss(params, latents, *conditions):
        return (mmdit.apply(params, config, latents, *conditions) - latents).square().mean()

    return loss, {**params, "blocks": params["blocks"][1:]}


def test_compiled_gradients_equal_eager(last_block_alone):
    loss, params = last_block_alone
    backend = CompileCounterWithBackend("inductor" if transform.compiler_available() else "aot_eager")
    torch._dynamo.reset()
    # In the latents: through every layer, with half of the kernels of gradients in the parameters, which the next test
    # traces and the gradients of `tests/core/test_transform.py` and of the text encoders build.
    gradient = grad_and_value(loss, argnums=1)
    assert close(
        transform.compile(gradient, backend=backend)(params, *random_inputs()), gradient(params, *random_inputs())
    )
    assert backend.frame_count == 1


def test_gradients_at_new_sizes_compile_once_more_and_never_again(last_block_alone):
    loss, params = last_block_alone
    backend = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = transform.compile(grad_and_value(loss), backend=backend)
    for height, width, tokens in ((4, 6, 3), (8, 10, 5), (12, 16, 7), (6, 4, 9)):
        inputs = random_inputs(height, width, tokens)
        assert close(compiled(params, *inputs), grad_and_value(loss)(params, *inputs))
    assert backend.frame_count == 2


def test_compiling_one_block_compiles_each_kind_of_block_once(params):
    backend = CompileCounterWithBackend("eager")
    torch._dynamo.reset()

    def block_transform(block):
        return torch.compile(block, backend=backend, fullgraph=True)

    config = mmdit.Config(**{**vars(CONFIG), "depth": 5, "dual_attention_layers": (0, 1)})
    blocks = [params["blocks"][0]] * 2 + [single(params["blocks"][0])] * 2 + [single(params["blocks"][1])]
    deep = {**params, "blocks": blocks}
    for _ in range(2):
        out = mmdit.apply(deep, config, *random_inputs(), block_transform=block_transform)
    assert close(out, mmdit.apply(deep, config, *random_inputs()))
    assert backend.frame_count == 3


def single(block):
    """A block without its second attention, if it has one."""
    image = {name: leaf for name, leaf in block["image"].items() if name != "attention2"}
    image["modulation"] = tree.map(lambda leaf: leaf[: 6 * CONFIG.width], image["modulation"])
    return {**block, "image": image}
