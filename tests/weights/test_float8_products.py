"""Trees with products of float8: their formula, its derivatives and errors, the kernel beside it, files of them.

The kernel is for GPUs of Nvidia's; PyTorch computes the product that it calls on a CPU too, where it is compared here.
"""

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.core import layers, prng, tree
from functional_sd3.kernels import cuda
from functional_sd3.transformer import mmdit
from functional_sd3.weights import quantize
from functional_sd3.weights.product_errors import product_errors


@pytest.fixture(scope="module")
def stored(model):
    return quantize.quantize(model.params, torch.float8_e4m3fn, compute="float8", smallest=0)


def layer(outputs=32, inputs=48):
    plain = {"weight": prng.normal(prng.key(0), (outputs, inputs)), "bias": prng.normal(prng.key(1), (outputs,))}
    return quantize.quantize({"blocks": [{"attention": {"out": plain}}]}, torch.float8_e4m3fn, compute="float8",
                             smallest=0)["blocks"][0]["attention"]["out"]  # fmt: skip


X = prng.normal(prng.key(2), (2, 5, 48)) * torch.tensor([1e-3, 1.0, 0.0, 1e3, 10.0])[:, None]


def test_the_product_is_of_numbers_that_float8_has():
    params = layer()
    numbers, steps = layers.to_float8(X)
    exact = numbers.double() * steps.double() @ (params["weight"].double() * params["float8_scale"].double()[:, None]).T
    torch.testing.assert_close(layers.linear(params, X).double(), exact + params["bias"].double(), rtol=1e-5, atol=1e-5)
    assert (numbers[:, [0, 1, 3, 4]].float().abs().amax(-1) == 448).all() and not numbers[:, 2].float().any()


def test_each_row_is_rounded_by_its_own_largest_value():
    rounded = layers.round_rows_to_float8(X)
    # Half a unit in the last of four bits, or of the least subnormal number, 2^-9, times the row's step.
    bound = torch.maximum(X.abs() / 16, X.abs().amax(-1, keepdim=True) / 448 * 2.0**-10)
    assert ((rounded - X).abs() <= bound * 1.001).all() and (rounded != X).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beside", [(), ("low_rank",)])
def test_the_kernel_is_the_formula(dtype, beside):
    params = layer()
    if beside:
        params["low_rank"] = {"down": prng.normal(prng.key(3), (2, 48)), "up": prng.normal(prng.key(4), (32, 2))}
    params = {name: leaf.to(dtype) if name == "bias" else leaf for name, leaf in params.items()}
    x = X.to(dtype)
    expected = layers.linear.formula(params, x).double()
    bound = (1e-6 if dtype == torch.float32 else 1e-2) * expected.norm()
    assert (cuda.linear_float8(params, x).double() - expected).norm() <= bound
    assert not cuda.fits_linear_float8(params, x)  # On a CPU.


def test_gradients_are_those_of_the_dequantised_weight_as_if_the_input_were_not_rounded():
    params = layer()
    weight = layers.dequantized_weight(params, torch.float32)
    found = torch.func.grad(lambda x: layers.linear(params, x).square().sum())(X)
    expected = 2 * layers.linear(params, X) @ weight
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))


def velocity(params, sizes):
    shapes = (2, sizes.in_channels, 8, 8), (2, 5, sizes.context_width), (2, sizes.pooled_width)
    x, context, pooled = (prng.normal(prng.key(index), shape) for index, shape in enumerate(shapes))
    return mmdit.apply(params["transformer"], sizes, x, torch.tensor([0.2, 0.8]), context, pooled)


def test_a_network_computes_with_them(model, stored):
    sizes = model.config.transformer
    exact, found = velocity(model.params, sizes), velocity(stored, sizes)
    of_weights = velocity(quantize.without_products(stored), sizes)
    errors = [float((each - exact).norm() / exact.norm()) for each in (of_weights, found)]
    assert 1e-3 < errors[0] < errors[1] < 0.1
    assert quantize.has_products(stored, "float8") and not quantize.has_products(stored, "int8")
    assert quantize.has_products(stored) and quantize.is_quantized(stored)
    assert torch.equal(velocity(quantize.dequantize(stored), sizes), of_weights)


def test_the_errors_of_products_are_measured_on_the_inputs_of_a_run(model, stored):
    sizes, params = model.config.transformer, model.params["transformer"]
    found = product_errors(params, stored["transformer"], lambda own: velocity({"transformer": own}, sizes))
    products = [path for path in tree.flatten_paths(stored["transformer"]) if path.endswith(".float8_scale")]
    used = {path.replace(".float8_scale", ".weight") for path in products}
    # Two roundings to four bits each, of random numbers: 2.6 % of each factor.
    assert found.keys() == used and all(0.01 < error < 0.06 for error in found.values())


def test_files_keep_them(model, stored, tmp_path):
    weights.save(tmp_path / "model", model._replace(params=stored), layout="native")
    loaded = weights.load(tmp_path / "model", dtype="stored", quantized=True).params
    own, other = (tree.flatten_paths(each) for each in (stored, loaded))
    assert own.keys() == other.keys() and any(path.endswith(".float8_scale") for path in own)
    assert all(torch.equal(leaf.float(), other[path].float()) for path, leaf in own.items())


def test_a_dtype_that_is_not_that_of_the_product_is_refused(model):
    for dtype, compute in ((torch.int8, "float8"), (torch.float8_e4m3fn, "int8"), (torch.int8, "int4")):
        with pytest.raises(ValueError, match="must be None, or that of the dtype: 'int8' with torch.int8 or 'float8'"):
            quantize.quantize(model.params, dtype, compute=compute)
