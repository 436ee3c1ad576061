"""Faster forms of the operations of `core`: one table from an operation to its kernels.

A kernel has the signature of its operation, a predicate of the arguments it fits, and the kinds of `dispatch.tracking`
under which it may run; each equals its formula (`tests/kernels`). Kernels are independent of any model. Private names
of PyTorch are called once before they are relied on; a missing one costs speed only.
"""

from functional_sd3.core.dispatch import COMPILED, DIFFERENTIABLE, TRANSFORMED, TRANSFORMS, UNTRACKED, Kernel
from functional_sd3.kernels import (
    attention,
    attention_products,
    convolution_functions,
    cuda,
    foreach,
    inductor,
    int8,
    layouts,
    linear,
    modulation_functions,
    norm_functions,
    norms,
    onednn,
    prepacked,
    winograd,
)

_LISTS = DIFFERENTIABLE | COMPILED

TABLE: dict[str, tuple[Kernel, ...]] = {
    "attention.softmax_attention": (
        Kernel(attention.in_graph, attention.fits, COMPILED),
        Kernel(attention_products.untracked, attention_products.fits, UNTRACKED, 1e-2),
        Kernel(attention.untracked, attention.fits_always, UNTRACKED | COMPILED),
        Kernel(attention.differentiable, attention.fits, TRANSFORMED),
    ),
    "layers.linear": (
        Kernel(cuda.linear_float8, cuda.fits_linear_float8, UNTRACKED | COMPILED, 1e-2),
        Kernel(prepacked.linear, prepacked.fits_product, UNTRACKED, 1e-2),
        Kernel(prepacked.with_plain_weight, prepacked.fits, DIFFERENTIABLE | TRANSFORMS, 1e-2),
        Kernel(int8.linear, int8.fits, UNTRACKED),
        Kernel(int8.differentiable, int8.fits_differentiable, TRANSFORMED),
        Kernel(int8.in_graph, int8.fits_in_graph, COMPILED),
        Kernel(onednn.linear, onednn.fits_linear, UNTRACKED),
        Kernel(onednn.linear_bfloat16, onednn.fits_bfloat16, UNTRACKED, 1e-2),
        Kernel(onednn.differentiable, onednn.fits_differentiable, DIFFERENTIABLE),
        Kernel(linear.in_graph, linear.fits, COMPILED),
        Kernel(onednn.in_graph, onednn.fits_in_graph, COMPILED),
        Kernel(inductor.linear, inductor.fits_linear, COMPILED),
        Kernel(linear.differentiable, linear.fits, TRANSFORMS),
    ),
    "layers.linear_activation": (
        Kernel(int8.linear_activation, int8.fits_activation, UNTRACKED),
        Kernel(onednn.linear_activation, onednn.fits_linear_activation, UNTRACKED),
        Kernel(onednn.linear_activation_bfloat16, onednn.fits_activation_bfloat16, UNTRACKED, 1e-2),
        Kernel(cuda.linear_activation, cuda.fits_linear_activation, UNTRACKED, 1e-3),
    ),
    "layers.packed_weight": (Kernel(prepacked.pack, prepacked.fits_pack, UNTRACKED, 0.0),),
    "layers.cast_leaves": (Kernel(cuda.cast_leaves, cuda.fits_cast_leaves, DIFFERENTIABLE, 0.0),),
    "layers.conv2d": (
        Kernel(winograd.conv2d, winograd.fits_conv2d, UNTRACKED, 5e-6),
        Kernel(convolution_functions.conv2d, convolution_functions.fits, TRANSFORMS),
    ),
    "layers.upsample_conv2d": (Kernel(winograd.upsample_conv2d, winograd.fits_upsample_conv2d, UNTRACKED, 5e-6),),
    "layers.residual_block": (Kernel(winograd.residual_block, winograd.fits_residual_block, UNTRACKED, 5e-6),),
    "layers.image_layout": (Kernel(layouts.image_layout, layouts.fits_image_layout, DIFFERENTIABLE, 0.0),),
    "layers.rms_norm": (
        Kernel(norms.rms_norm, norms.fits_rms_norm, UNTRACKED),
        Kernel(cuda.rms_norm, cuda.fits_rms_norm, DIFFERENTIABLE, 1e-2),
        Kernel(norm_functions.rms_norm, norm_functions.fits, TRANSFORMS),
    ),
    "layers.layer_norm": (
        Kernel(norms.layer_norm, norms.fits_layer_norm, UNTRACKED | TRANSFORMED | COMPILED),
        Kernel(norm_functions.layer_norm, norm_functions.fits, TRANSFORMS),
    ),
    "layers.group_norm": (
        Kernel(norms.group_norm, norms.fits_group_norm, UNTRACKED, 5e-6),
        Kernel(norm_functions.group_norm, norm_functions.fits_group_norm, TRANSFORMS),
    ),
    "layers.group_norm_silu": (Kernel(norms.group_norm_silu, norms.fits_group_norm, UNTRACKED, 5e-6),),
    "layers.modulate": (Kernel(modulation_functions.modulate, modulation_functions.fits, TRANSFORMS),),
    "layers.add_gated": (Kernel(modulation_functions.add_gated, modulation_functions.fits, TRANSFORMS),),
    "layers.gelu_tanh": (Kernel(inductor.gelu_tanh, inductor.fits_gelu_tanh, COMPILED),),
    "prng.threefry": (
        Kernel(cuda.threefry, cuda.fits_threefry, UNTRACKED, 0.0),
        Kernel(inductor.threefry, inductor.fits_threefry, COMPILED, 0.0),
    ),
    "prng.gaussian": (Kernel(cuda.gaussian, cuda.fits_gaussian, UNTRACKED),),
    "leafwise.multiply": (Kernel(foreach.multiply, foreach.fits, _LISTS),),
    "leafwise.add": (Kernel(foreach.add, foreach.fits, _LISTS),),
    "leafwise.add_inplace": (Kernel(foreach.add_inplace, foreach.fits, UNTRACKED),),
    "leafwise.lerp": (Kernel(foreach.lerp, foreach.fits, _LISTS),),
    "leafwise.lerp_inplace": (Kernel(foreach.lerp_inplace, foreach.fits, UNTRACKED),),
    "leafwise.global_norm": (
        Kernel(foreach.global_norm_in_rows, foreach.fits_global_norm_in_rows, UNTRACKED),
        Kernel(foreach.global_norm, foreach.fits, _LISTS),
    ),
    "leafwise.adam": (Kernel(foreach.adam, foreach.fits, UNTRACKED | COMPILED),),
    "leafwise.adamw_inplace": (Kernel(foreach.adamw_inplace, foreach.fits_adamw_inplace, UNTRACKED),),
}
"""Operation -> its kernels; the first that fits runs."""
