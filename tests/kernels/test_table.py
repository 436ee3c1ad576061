"""Every kernel of the table equals its formula, and runs only for those who may be given it."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from functional_sd3 import kernels
from functional_sd3.core import attention, dispatch, layers, leafwise, prng, tree
from functional_sd3.kernels import int8_functions, onednn, prepacked
from tests import choices


@pytest.fixture(autouse=True)
def small_layers_by_one_dnn(monkeypatch):
    choices.use(monkeypatch)


OPERATIONS = {
    name: getattr(
        {"attention": attention, "layers": layers, "prng": prng, "leafwise": leafwise}[name.split(".")[0]],
        name.split(".")[1],
    )
    for name in kernels.TABLE
}
KERNELS = {kernel.name: (name, kernel) for name, found in kernels.TABLE.items() for kernel in found}


def drawn(*shape, seed=0):
    return prng.normal(prng.key(seed), shape)


def image(*shape, seed=0):
    return drawn(*shape, seed=seed).contiguous(memory_format=torch.channels_last)


def leaves(seed, *shapes):
    return [drawn(*shape, seed=seed + index) for index, shape in enumerate(shapes or [(3, 5), (7,)])]


LAYER = {"weight": drawn(24, 16, seed=1), "bias": drawn(24, seed=2)}
ADAPTER = {"down": drawn(2, 16, seed=3), "up": drawn(24, 2, seed=4)}
# The bias first, as the leaf that is differentiated.
PACKED = {"bias": LAYER["bias"], "weight": prepacked.pack(LAYER)}
INT8 = {
    "weight": torch.arange(384).sub(192).clamp(-127, 127).to(torch.int8).view(24, 16),
    "bias": LAYER["bias"],
    "int8_scale": drawn(24).abs() / 127,
}
FLOAT8 = {
    "weight": drawn(32, 16, seed=1).to(torch.float8_e4m3fn),
    "bias": drawn(32, seed=2).bfloat16(),
    "float8_scale": drawn(32).abs() / 448,
}
CONV = {"weight": drawn(64, 64, 3, 3, seed=3) / 24, "bias": drawn(64, seed=4)}
WIDER = {"weight": drawn(96, 64, 3, 3, seed=3) / 24, "bias": drawn(96, seed=4)}
BACK = {"weight": drawn(96, 96, 3, 3, seed=5) / 29, "bias": drawn(96, seed=6)}


def norm(width):
    return {"weight": 1 + 0.1 * drawn(width, seed=7), "bias": drawn(width, seed=8)}


def residual_block(inputs, outputs):
    same = inputs == outputs
    convolutions = {"conv1": CONV, "conv2": CONV} if same else {"conv1": WIDER, "conv2": BACK}
    pointwise = {"weight": drawn(outputs, inputs, 1, 1, seed=9) / 8, "bias": drawn(outputs)}
    shortcut = {} if same else {"shortcut": pointwise}
    return {"norm1": norm(inputs), "norm2": norm(outputs), **convolutions, **shortcut}


MOMENTS = [leaves(1), leaves(3), [leaf.square() for leaf in leaves(5)]]
KEYS = prng.key(3).to(torch.int32)
QKV = tuple(drawn(2, 3, tokens, 8, seed=tokens) for tokens in (13, 17, 17))
ATTENTIONS = [
    (*QKV, None, False, 0.3),
    (*QKV, None, True, 0.3),
    (*QKV, drawn(2, 1, 13, 17) > -0.5, False, 0.3),
    (*QKV, drawn(3, 1, 17), False, 0.3),
]
NARROW_LAYER = tree.cast(LAYER, torch.bfloat16)
NARROW_QKV = tuple(drawn(2, 3, tokens, 8, seed=tokens).bfloat16() for tokens in (150, 37, 37))
# Kernel -> several argument lists that it fits.
EXAMPLES = {
    "attention.in_graph": ATTENTIONS,
    "attention.untracked": ATTENTIONS,
    "attention_products.untracked": [(*NARROW_QKV, None, False, 0.3)],
    "attention.differentiable": ATTENTIONS,
    "int8.linear": [(INT8, drawn(2, 8, 16)), (INT8, drawn(600, 16)), (INT8, torch.zeros(3, 16)), (INT8, drawn(0, 16))],
    "int8.differentiable": [(INT8 | {"low_rank": ADAPTER}, drawn(2, 8, 16)), (INT8, drawn(300, 16))],
    "int8.in_graph": [(INT8, drawn(2, 8, 16)), (INT8 | {"low_rank": ADAPTER}, drawn(5, 16))],
    "int8.linear_activation": [(INT8, drawn(300, 16), activation) for activation in layers.ACTIVATIONS],
    "prepacked.pack": [(LAYER,), (NARROW_LAYER,)] if onednn.has_bfloat16() else [(LAYER,)],
    "prepacked.linear": [(PACKED, drawn(*shape, 16)) for shape in ((2, 8), (5,), (0,), (600,))],
    "prepacked.with_plain_weight": [(PACKED, drawn(2, 8, 16)), ({**PACKED, "low_rank": ADAPTER}, drawn(5, 16))],
    "onednn.linear": [(LAYER, drawn(2, 8, 16)), (LAYER, drawn(300, 16)), (LAYER, drawn(1, 600, 16))]
    + [({"weight": LAYER["weight"]}, drawn(rows, 16)) for rows in (20, 600)],
    "onednn.linear_bfloat16": [(NARROW_LAYER, drawn(*shape, 16).bfloat16()) for shape in ((2, 8), (5,), (0,))],
    "onednn.linear_activation_bfloat16": [
        (NARROW_LAYER, drawn(*shape, 16).bfloat16(), activation)
        for activation in ("gelu", "gelu_tanh")
        for shape in ((2, 8), (5,), (0,))
    ],
    "onednn.differentiable": [
        (LAYER, drawn(300, 16)),
        ({**LAYER, "low_rank": ADAPTER}, drawn(2, 8, 16)),
        ({"weight": torch.arange(384, dtype=torch.int8).view(24, 16), "scale": drawn(24).abs()}, drawn(16, 16)),
    ],
    "onednn.in_graph": [(LAYER, drawn(2, 8, 16)), ({"weight": LAYER["weight"]}, drawn(20, 16))],
    "onednn.linear_activation": [
        (params, drawn(*shape, 16), activation)
        for activation in layers.ACTIVATIONS
        for params in (LAYER, {"weight": LAYER["weight"]})
        for shape in ((5,), (2, 7), (0,), (600,))
    ],
    "cuda.linear_activation": [(LAYER, drawn(5, 16), "gelu_tanh"), (LAYER, drawn(2, 100, 16), "gelu_tanh")],
    "cuda.linear_float8": [(FLOAT8, drawn(5, 16).bfloat16()), (FLOAT8, drawn(2, 100, 16).bfloat16())],
    "cuda.cast_leaves": [(leaves(1), torch.bfloat16), (leaves(1), torch.float64)],
    "winograd.conv2d": [(CONV, image(2, 64, 36, 40)), (WIDER, image(1, 64, 32, 32))],
    "winograd.upsample_conv2d": [(CONV, image(2, 64, 18, 20)), (WIDER, image(1, 64, 16, 16))],
    "winograd.residual_block": [
        (residual_block(64, 64), image(2, 64, 36, 40), 8, 1e-6),
        (residual_block(64, 96), image(1, 64, 32, 32), 8, 1e-6),
        (residual_block(64, 64), image(1, 64, 320, 256), 4, 1e-6),
    ],
    "layouts.image_layout": [(drawn(2, 3, 5, 7),)],
    "norms.rms_norm": [({"weight": drawn(6, seed=1)}, drawn(2, 3, 6, seed=2), 1e-6)],
    "cuda.rms_norm": [({"weight": drawn(6, seed=1)}, drawn(2, 3, 6, seed=2), 1e-6)],
    "linear.differentiable": [(LAYER, drawn(2, 8, 16)), ({"weight": LAYER["weight"]}, drawn(5, 16))],
    "linear.in_graph": [(LAYER, drawn(2, 8, 16)), ({"weight": LAYER["weight"]}, drawn(5, 16))],
    "norms.layer_norm": [({}, drawn(2, 3, 6), 1e-6), (norm(6), drawn(5, 6), 1e-6)],
    "norm_functions.rms_norm": [({"weight": drawn(6, seed=1)}, drawn(2, 3, 6, seed=2), 1e-6)],
    "norm_functions.group_norm": [(norm(6), drawn(2, 6, 3, 2, seed=2), 3, 1e-6)],
    "convolution_functions.conv2d": [(CONV, drawn(1, 64, 3, 5, seed=2))],
    "norm_functions.layer_norm": [({}, drawn(2, 3, 6, seed=2), 1e-6), (norm(6), drawn(5, 6), 1e-6)],
    "modulation_functions.modulate": [(drawn(2, 3, 6), drawn(2, 1, 6, seed=1), drawn(2, 1, 6, seed=2))],
    "modulation_functions.add_gated": [(drawn(2, 3, 6), drawn(2, 1, 6, seed=1), drawn(2, 3, 6, seed=2))],
    "norms.group_norm": [(norm(32), image(2, 32, 128, 144), 8, 1e-6)],
    "norms.group_norm_silu": [(norm(32), image(2, 32, 128, 144), 8, 1e-6)],
    "inductor.linear": [(LAYER, drawn(2, 8, 16))],
    "inductor.gelu_tanh": [(4 * drawn(3, 100),)],
    "inductor.threefry": [
        (*KEYS, torch.arange(5, dtype=torch.int32)),
        (*KEYS, torch.arange(5, dtype=torch.int32), torch.ones(5, dtype=torch.int32)),
    ],
    "cuda.threefry": [(*KEYS, torch.arange(5, dtype=torch.int32))],
    "cuda.gaussian": [(prng.uniform(prng.key(1), (1000,)),)],
    "foreach.multiply": [(leaves(1), 0.5), (leaves(1), torch.tensor(0.5))],
    "foreach.add": [(leaves(1), leaves(5), 0.3)],
    "foreach.add_inplace": [(leaves(1), leaves(5))],
    "foreach.lerp": [(leaves(1), leaves(5), torch.tensor(0.3))],
    "foreach.lerp_inplace": [(leaves(1), leaves(5), torch.tensor(0.3))],
    "foreach.global_norm_in_rows": [(leaves(1, (64, 700), (5,)),)],
    "foreach.global_norm": [(leaves(1),)],
    "foreach.adam": [(*MOMENTS, torch.tensor(0.4), torch.tensor(0.2), 0.9, 0.99, 1e-8)],
    "foreach.adamw_inplace": [
        (leaves(7), *MOMENTS, torch.tensor(3.0), divisor, torch.tensor(1e-2), 0.9, 0.99, 1e-8, 0.1)
        for divisor in (None, torch.tensor(2.0))
    ],
}
OPTIONS = {"winograd.conv2d": {"padding": 1}}
NEEDS_NVIDIA = {"cuda.linear_activation", "cuda.threefry", "cuda.gaussian"}
NEEDS_BFLOAT16 = set() if onednn.has_bfloat16() else {"onednn.linear_bfloat16", "onednn.linear_activation_bfloat16"}
NEEDS_INT8 = {name for name in KERNELS if name.startswith("int8.") and int8_functions.product() is None}
"""Kernels of instructions that this processor lacks, as NEEDS_BFLOAT16."""
HAS_NVIDIA = torch.cuda.is_available() and torch.version.hip is None
UNFIT = {name for name in KERNELS if name.startswith("cuda.")} | {"onednn.differentiable", "prepacked.pack"}
"""Kernels for other machines and other choices than those of these tests."""
INTEGER = {"inductor.threefry", "cuda.threefry"}
IN_FORWARD_MODE = ("convolution_functions", "linear", "norm_functions", "modulation_functions")
"""Modules of kernels that fit under forward mode alone."""


def device_of(name):
    return "cuda" if name.startswith("cuda.") and HAS_NVIDIA else "cpu"


def moved(arguments, device):
    def copied(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.clone() if leaf.is_mkldnn else leaf.to(device, copy=True)

    return tree.map(copied, list(arguments))


def numbers(*values):
    """Every tensor in results and arguments, as one list."""
    tensors = [leaf for leaf in tree.leaves(list(values)) if isinstance(leaf, torch.Tensor)]
    return [leaf.to_dense() if leaf.is_mkldnn else leaf for leaf in tensors]


def test_every_kernel_has_an_example():
    assert set(EXAMPLES) == set(KERNELS)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_equals_its_formula_and_changes_only_what_the_formula_changes(name, monkeypatch):
    if name in NEEDS_NVIDIA and not HAS_NVIDIA:
        pytest.skip("needs a GPU of Nvidia's")
    if name in NEEDS_BFLOAT16:
        pytest.skip("needs a processor with AVX512")
    if name in NEEDS_INT8:
        pytest.skip("needs products of int8 that are right")
    operation, kernel = KERNELS[name]
    if name in ("onednn.differentiable", "onednn.in_graph", "prepacked.pack"):
        choices.use(monkeypatch, choices.ALL)
    for example in EXAMPLES[name]:
        first, second = (moved(example, device_of(name)) for _ in range(2))
        options = OPTIONS.get(name, {})
        in_forward_mode = name.split(".")[0] in IN_FORWARD_MODE
        with forward_ad.dual_level() if in_forward_mode else nullcontext():
            fits = kernel.fits(*first, **options)
        assert fits or device_of(name) == "cpu" and name.startswith("cuda.")
        with dispatch.plain():
            expected = OPERATIONS[operation](*second, **options)
        found = kernel.run(*first, **options)
        if name == "foreach.adamw_inplace" and example[5] is not None:
            first[1] = second[1] = None  # spent: the kernel may leave quotients in the gradients
        for ours, theirs in zip(numbers(found, first), numbers(expected, second), strict=True):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            bound = kernel.tolerance * float(theirs.double().norm()) + 1e-30
            assert float((ours.double() - theirs.double()).norm()) <= bound


class Special(torch.Tensor):
    pass


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Overridden(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def differentiable(arguments):
    """The first float tensor among the arguments, and the arguments as a function of it."""
    flat = tree.flatten_paths(arguments)
    path = next(
        path
        for path, leaf in flat.items()
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype.itemsize > 1
    )

    def rebuilt(leaf):
        return tree.map_with_path(lambda own, old: leaf if own == path else old, arguments)

    return flat[path], rebuilt


def total(call, leaf, rebuilt):
    return sum(each.double().square().sum() for each in numbers(call(*rebuilt(leaf))))


def second_order(call, leaf, rebuilt):
    grad = torch.func.grad(partial(total, call), argnums=0)
    return torch.func.grad(lambda leaf: grad(leaf, rebuilt).square().sum())(leaf)


def dual(call, leaf, rebuilt):
    with forward_ad.dual_level():
        call(*rebuilt(forward_ad.make_dual(leaf, torch.ones_like(leaf))))


def under(mode, call, leaf, rebuilt):
    with mode:
        call(*rebuilt(leaf))


def within_jvp_of_something_else(call, leaf, rebuilt):
    one = torch.ones(())
    torch.func.jvp(lambda factor: factor * total(call, leaf, rebuilt), (one,), (one,))


def mapped(call, leaf, rebuilt):
    torch.func.vmap(lambda leaf: call(*rebuilt(leaf)))(torch.stack([leaf, leaf]))


def mapped_gradient(call, leaf, rebuilt):
    torch.func.vmap(torch.func.grad(partial(total, call)), in_dims=(0, None))(torch.stack([leaf, leaf]), rebuilt)


WATCHERS = {
    "torch.func.grad": ("other", lambda call, leaf, rebuilt: torch.func.grad(partial(total, call))(leaf, rebuilt)),
    "torch.func.grad twice": ("other", second_order),
    "vmap": ("other", mapped),
    "vmap of grad": ("other", mapped_gradient),
    "torch.func.jvp": (
        "other",
        lambda call, leaf, rebuilt: torch.func.jvp(lambda x: total(call, x, rebuilt), (leaf,), (leaf,)),
    ),
    "jvp of something else": ("other", within_jvp_of_something_else),
    "forward_ad": ("other", dual),
    "autocast": ("other", lambda *given: under(torch.autocast("cpu", torch.bfloat16), *given)),
    "a dispatch mode": ("other", lambda *given: under(Dispatched(), *given)),
    "a function mode": ("other", lambda *given: under(Overridden(), *given)),
    "a tensor subclass": ("other", lambda call, leaf, rebuilt: call(*rebuilt(leaf.as_subclass(Special)))),
    "autograd": ("autograd", lambda call, leaf, rebuilt: total(call, leaf.requires_grad_(), rebuilt).backward()),
    "no_grad": ("none", lambda call, leaf, rebuilt: torch.no_grad()(call)(*rebuilt(leaf.requires_grad_()))),
    "nothing": ("none", lambda call, leaf, rebuilt: call(*rebuilt(leaf))),
    "plain": (None, lambda *given: under(dispatch.plain(), *given)),
}
WRITES = {name for name in KERNELS if name.endswith("inplace")}
BESIDE = {"prepacked.linear": (KERNELS["prepacked.with_plain_weight"][1],)}
"""Kernels that a kernel leaves its arguments to: their formula cannot be differentiated."""


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_kernel_runs_only_for_those_who_may_be_given_it(watcher, monkeypatch):
    tracking, watch = WATCHERS[watcher]
    for name, (operation, kernel) in KERNELS.items():
        writes = name in WRITES and watcher not in ("nothing", "plain", "a dispatch mode")
        if name in INTEGER | NEEDS_NVIDIA | NEEDS_BFLOAT16 | NEEDS_INT8 or writes:
            continue
        called = []
        recorded = kernel._replace(
            run=lambda *given, run=kernel.run, called=called, **options: called.append(1) or run(*given, **options),
            # Whoever may not be given it is not given it whatever the sizes; some cannot even be asked for them.
            fits=kernel.fits if tracking == "none" and name not in UNFIT else lambda *_, **__: True,
        )
        monkeypatch.setitem(kernels.TABLE, operation, (recorded, *BESIDE.get(name, ())))
        call = partial(OPERATIONS[operation], **OPTIONS.get(name, {}))
        arguments = moved(EXAMPLES[name][0], "cpu")
        if tracking == "other":
            # Group norms of channels_last images have no forward-mode derivative and no batching rule.
            arguments = tree.map(
                lambda x: x.contiguous() if isinstance(x, torch.Tensor) and not x.is_mkldnn else x, arguments
            )
        watch(call, *differentiable(arguments))
        assert bool(called) == (tracking in kernel.tracking), f"{name} under {watcher}"


@pytest.mark.parametrize("name", [name for name, (_, kernel) in KERNELS.items() if "compiler" in kernel.tracking])
def test_a_compiler_is_given_its_own_kernels_and_no_others(name, monkeypatch):
    if name in NEEDS_INT8:
        pytest.skip("needs products of int8 that are right")
    operation, kernel = KERNELS[name]
    arguments = moved(EXAMPLES[name][0], "cpu")
    expected = OPERATIONS[operation].formula(*arguments)
    others = [other for other in kernels.TABLE[operation] if "compiler" not in other.tracking]
    never = [other._replace(run=None, fits=lambda *_, **__: True) for other in others]
    monkeypatch.setitem(kernels.TABLE, operation, (*never, kernel))
    torch._dynamo.reset()
    found = torch.compile(lambda *given: OPERATIONS[operation](*given), backend="eager", fullgraph=True)(*arguments)
    for ours, theirs in zip(numbers(found), numbers(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("extra", ["low_rank", *layers.SCALES])
def test_a_layer_with_something_beside_its_weight_is_not_computed_without_it(extra):
    beside = {"low_rank": ADAPTER} | dict.fromkeys(layers.SCALES, drawn(24, seed=5).abs())
    for name in (
        *("onednn.linear", "onednn.linear_activation", "cuda.linear_activation"),
        *("onednn.linear_bfloat16", "onednn.linear_activation_bfloat16"),
    ):
        _, kernel = KERNELS[name]
        params, *rest = EXAMPLES[name][0]
        assert not kernel.fits({**params, extra: beside[extra]}, *rest)


@pytest.mark.parametrize("rows", [1, 20])
def test_no_layer_loses_the_tangent_of_a_dual_number(rows):
    x, tangent = drawn(rows, 16, seed=7), drawn(rows, 16, seed=8)
    for call in (
        partial(layers.linear, LAYER),
        *(partial(layers.linear_activation, LAYER, activation=name) for name in layers.ACTIVATIONS),
    ):
        _, expected = torch.func.jvp(call, (x,), (tangent,))
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(call(forward_ad.make_dual(x, tangent))).tangent
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
