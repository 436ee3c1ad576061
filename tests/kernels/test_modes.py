"""Under a dispatch mode or a function mode every fast path steps aside: the mode is shown PyTorch's own operations."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from functional_sd3.core import dispatch, layers, prng, tree
from functional_sd3.image import taesd, vae
from functional_sd3.metrics import inception
from functional_sd3.text import clip, t5
from functional_sd3.transformer import controlnet, mmdit
from tests import choices, models
from tests.operations import counted


@pytest.fixture(autouse=True)
def small_layers_by_one_dnn(monkeypatch):
    choices.use(monkeypatch)


def drawn(*shape, seed=0):
    return prng.normal(prng.key(seed), shape)


class Names(TorchDispatchMode):
    """The namespaces of the operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


class Transparent(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


LAYER = {"weight": drawn(24, 16, seed=1), "bias": drawn(24, seed=2)}
CONV = {"weight": drawn(64, 64, 3, 3, seed=3) / 24, "bias": drawn(64, seed=4)}
LAYERS = {
    # name: (run, the multiplications and additions of its products)
    "linear by oneDNN": (lambda: layers.linear(LAYER, drawn(2, 16, 16)), 2 * 32 * 24 * 16),
    "linear by BLAS": (lambda: layers.linear(LAYER, drawn(1, 600, 16)), 2 * 600 * 24 * 16),
    "linear of few rows": (lambda: layers.linear(LAYER, drawn(3, 16)), 2 * 3 * 24 * 16),
    **{
        f"linear with {name} inside": (
            lambda name=name: layers.linear_activation(LAYER, drawn(2, 16, 16), name),
            2 * 32 * 24 * 16,
        )
        for name in layers.ACTIVATIONS
    },
    "convolution by Winograd": (lambda: layers.conv2d(CONV, large_image(), padding=1), 2 * 64 * 64 * 9 * 32 * 32),
    "convolution of twice the size": (lambda: layers.upsample_conv2d(CONV, large_image()), 2 * 64 * 64 * 9 * 64 * 64),
}


def large_image():
    return drawn(1, 64, 32, 32, seed=5).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("gradient", [False, True], ids=["no_grad", "grad"])
def test_the_flops_of_a_layer_are_those_of_its_product(name, gradient):
    run, expected = LAYERS[name]
    with torch.set_grad_enabled(gradient):
        assert flops(run) == expected


@pytest.fixture(scope="module")
def networks():
    """name -> (forward of parameters, parameters): large enough for every fast path."""
    model = models.random_model()
    config, params = model.config, model.params
    wide = vae.Config(channels=(64, 64, 64, 64), blocks_per_level=1)
    sizes = config.transformer
    control = controlnet.Config(depth=1, heads=2, head_dim=16, context_width=sizes.context_width, in_channels=16,
                                pooled_width=sizes.pooled_width, position_size=12, sample_size=8)  # fmt: skip
    latents, t = drawn(2, 16, 16, 16), torch.tensor([0.3, 0.7])
    context, pooled = drawn(2, 40, sizes.context_width), drawn(2, sizes.pooled_width)
    ids = torch.arange(2 * 24).reshape(2, 24) % 50
    image = drawn(1, 3, 64, 64)
    small = taesd.Config(width=64)
    return {
        "mmdit": (lambda p: mmdit.apply(p, sizes, latents, t, context, pooled), params["transformer"]),
        "clip": (lambda p: clip.apply(p, config.clip_l, ids).pooled, params["clip_l"]),
        "t5": (lambda p: t5.apply(p, config.t5, ids), params["t5"]),
        "vae encode": (lambda p: vae.encode(p, wide, image).mean, vae.init(prng.key(1), wide)),
        "vae decode": (lambda p: vae.decode(p, wide, drawn(1, 16, 8, 8)), vae.init(prng.key(1), wide)),
        "taesd decode": (lambda p: taesd.decode(p, small, drawn(1, 16, 8, 8)), taesd.init(prng.key(2), small)),
        "controlnet": (
            lambda p: controlnet.apply(p, control, latents, t, context, pooled, latents),
            controlnet.init(prng.key(3), control),
        ),
    }


@pytest.mark.parametrize("name", ["mmdit", "clip", "t5", "vae encode", "vae decode", "taesd decode", "controlnet"])
def test_the_flops_of_a_network_do_not_depend_on_whether_gradients_are_taken(networks, name):
    run, params = networks[name]
    with torch.no_grad():
        found = flops(lambda: run(params))
        with Names() as names:
            run(params)
    # Not T5's table of distances: for a mask that is learned PyTorch splits its fused attention, of which the counter
    # knows no form on a CPU, into products.
    learned = tree.map_with_path(
        lambda path, leaf: leaf.clone().requires_grad_(leaf.is_floating_point() and "relative_bias" not in path), params
    )
    assert found == flops(lambda: run(learned)) > 1e5
    assert not {"mkldnn", "mkl"} & names.seen


def test_inception_is_counted():
    params, images = models.random_inception(), drawn(1, 3, 299, 299)
    with torch.no_grad():
        found = flops(lambda: inception.apply(params, images, last=64))
    assert found == flops(lambda: inception.apply(params, images.clone().requires_grad_(), last=64)) > 1e8


def test_a_function_mode_is_shown_the_layers_and_a_default_device_changes_nothing():
    x = drawn(2, 16, 16)

    def run():
        with torch.no_grad():
            return layers.linear(LAYER, x)

    usual, names = counted(run)
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    assert ("_linear_pointwise" in names) == there
    with Transparent():
        found, names = counted(run)
    assert "_linear_pointwise" not in names and "addmm" in names
    torch.testing.assert_close(found, usual, rtol=2e-5, atol=2e-6)
    with torch.device("meta"):
        found, names = counted(run)
    assert ("_linear_pointwise" in names) == there and torch.equal(found, usual)
    with torch.device("meta"), Transparent():
        assert dispatch.in_mode()
    assert not dispatch.in_mode()


def test_a_graph_compiled_before_the_first_operation_is_not_compiled_again_after_it(monkeypatch):
    backend, x = CompileCounter(), drawn(2, 16)
    # Drawing was an operation: the state of a new process.
    monkeypatch.setattr(dispatch, "_table", None)
    compiled = torch.compile(lambda x: layers.linear(LAYER, x), backend=backend, fullgraph=True)
    first = compiled(x)
    torch.testing.assert_close(first, layers.linear(LAYER, x))
    assert dispatch._table is not None and torch.equal(compiled(x), first) and backend.frame_count == 1


def test_gradients_are_counted_as_those_of_pytorchs_own_layers():
    params = {name: leaf.clone().requires_grad_() for name, leaf in LAYER.items()}
    x = drawn(2, 16, 16).requires_grad_()

    def backward(apply):
        return flops(lambda: apply().square().sum().backward())

    plain = backward(lambda: torch.nn.functional.linear(x, params["weight"], params["bias"]))
    assert backward(lambda: layers.linear(params, x)) == plain == 3 * 2 * 32 * 24 * 16


def test_attention_is_counted_by_its_formula(networks):
    # PyTorch's counter knows no fused attention on a CPU, so that one asks for "math" to count it.
    config = models.config().clip_l
    ids, width = torch.arange(2 * 24).reshape(2, 24), config.width
    layer = 2 * 2 * 24 * width * (4 * width + 2 * config.mlp_width)
    products = config.layers * (layer + 2 * 2 * 2 * 24 * 24 * width) + 2 * 2 * width * config.projection_width
    params = clip.init(prng.key(0), config)
    with torch.no_grad():
        assert flops(lambda: clip.apply(params, config, ids, implementation="math")) == products
