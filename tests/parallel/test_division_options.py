"""What the transformer takes beside its inputs, divided over processes; and what does not divide."""

from functools import cache

import pytest
import torch

from functional_sd3 import lora, mmdit
from functional_sd3.core import attention, attention_variants, prng, tree
from functional_sd3.layouts.components import Config
from functional_sd3.parallel import mesh as meshes
from functional_sd3.parallel import sequence, tensor
from functional_sd3.transformer import ip_adapter
from functional_sd3.weights import quantize
from tests.parallel.examples import CONFIG, SPEC, differences, filled, inputs

ADAPTER = ip_adapter.Config(
    attentions=4, width=48, head_dim=8, image_width=8, hidden_width=16, depth=1, heads=2, resampler_head_dim=8,
    tokens=3, mlp_width=16, time_frequencies=8,
)  # fmt: skip


def shifted(streams):
    """Attention of one's own, which sees where a token stands."""
    image, *others = streams
    return attention.joint_attention([image._replace(value=image.value.roll(1, 2)), *others])


def image_prompt(params, t):
    features = prng.normal(prng.key(7), (2, 4, 8))
    return ip_adapter.apply(params, ADAPTER, features, t, CONFIG, 0.7)


OPTIONS = {
    "skipped": lambda arguments: {"skip_layers": [1]},
    "perturbed": lambda arguments: {"perturbed_layers": [0, 1]},
    "blurred": lambda arguments: {"perturbed_layers": [1], "perturbation": attention.blurred_attention},
    "attend": lambda arguments: {"attend": {0: shifted}},
    "windowed": lambda arguments: {"attend": attention_variants.windowed((3, 5), 1)},
    "residuals": lambda arguments: {"residuals": list(prng.normal(prng.key(3), (2, 2, 15, 48)))},
    "image_prompt": lambda arguments: {"image_prompt": image_prompt(filled(ip_adapter.spec(ADAPTER)), arguments[1])},
    "math": lambda arguments: {"implementation": "math"},
    "table": None,
}


def gradient(params, arguments, options, mesh=None):
    """Gradient of a loss in the parameters and the inputs."""

    def loss(params, arguments):
        own = dict(OPTIONS[options](arguments)) if OPTIONS[options] else {}
        if options == "table":
            own["modulations"] = mmdit.modulations(params, CONFIG, arguments[1], arguments[3], mesh=mesh)
        velocity = mmdit.apply(params, CONFIG, *arguments, mesh=mesh, **own)
        return (velocity * torch.linspace(-1, 1, velocity.numel()).view(velocity.shape)).sum()

    return torch.func.grad(loss, (0, 1))(params, arguments)


@cache
def one_process(name):
    return gradient(filled(SPEC), inputs(), name)


def errors_of_options(sizes, wanted):
    mesh, arguments = meshes.init(sizes), inputs()
    own = tensor.cut(filled(SPEC), SPEC, mesh, heads=CONFIG.heads)
    errors = {}
    for name, expected in wanted.items():
        divided = gradient(own, arguments, name, mesh)
        errors[name] = differences(expected, (tensor.whole(divided[0], SPEC, mesh), divided[1]))
    return errors


CASES = [
    (2, {"tensor": 2}, list(OPTIONS)),
    (2, {"sequence": 2}, list(OPTIONS)),
    (4, {"sequence": 4}, ["perturbed", "attend", "image_prompt"]),
]
"""The third has keys and values gathered; what meets the attention differs."""


@pytest.mark.parametrize(("count", "sizes", "names"), CASES, ids=["tensor", "ulysses", "gathered"])
def test_every_option_of_the_transformer_goes_with_a_mesh(processes, count, sizes, names):
    for errors in processes(count, errors_of_options, sizes, {name: one_process(name) for name in names}):
        assert errors.keys() == set(names) and max(errors.values()) < 3e-6, errors


MODEL = Config(transformer=CONFIG)
LORA = lora.spec(MODEL, 2, lambda path, leaf: ".blocks." in path and "modulation" not in path)


def errors_of_layers(sizes):
    """A LoRA inside, cut by its own spec or in its layers, over weights in float32 and int8."""
    mesh, arguments = meshes.init(sizes), inputs()
    params, adapter = {"transformer": filled(SPEC)}, filled(LORA, 4)
    stored = {"transformer": quantize.quantize(params["transformer"])}
    heads, spec = CONFIG.heads, {"transformer": SPEC}

    def loss(adapter, base, mesh=None):
        params = lora.apply(base, adapter, 0.5, lazy=True)
        return mmdit.apply(params["transformer"], CONFIG, *arguments, mesh=mesh).square().sum()

    def factors(gradient):
        """Without the alphas, which are not trained."""
        return tree.select(gradient, lambda path, leaf: not path.endswith("alpha"))

    own = tensor.cut(adapter, LORA, mesh, heads=heads)
    errors = {}
    for name, base in (("float32", params), ("int8", stored)):
        wanted = torch.func.grad(loss)(adapter, base)
        divided = torch.func.grad(loss)(own, tensor.cut(base, spec, mesh, heads=heads), mesh)
        errors[name] = differences(factors(wanted), factors(tensor.whole(divided, LORA, mesh)))
    applied = lora.apply(params, adapter, 0.5, lazy=True)
    cut_after = tensor.cut(applied, spec, mesh, heads=heads)
    value = mmdit.apply(applied["transformer"], CONFIG, *arguments)
    errors["applied before"] = differences(value, mmdit.apply(cut_after["transformer"], CONFIG, *arguments, mesh=mesh))
    return errors


def test_a_lora_inside_divided_layers_has_the_gradients_of_one_process(processes):
    for errors in processes(2, errors_of_layers, {"tensor": 2}):
        assert max(errors.values()) < 3e-6, errors


def misfits():
    messages = []
    grid = meshes.init({"tensor": 4})
    for call in (
        lambda: tensor.cut(filled(SPEC), SPEC, grid, heads=6),
        lambda: mmdit.apply(filled(SPEC), CONFIG, *inputs(), mesh=grid),
        lambda: mmdit.apply(filled(SPEC), CONFIG, *inputs(height=2, width=2), mesh=meshes.init({"sequence": 4})),
        lambda: sequence.ulysses_attention(grid.group("tensor"), (4, 4, 4, 4))(
            [attention.Stream(*(torch.zeros(1, 6, 4, 8),) * 3)]
        ),
        lambda: tensor.cut({"more": torch.zeros(2)}, {"weight": SPEC["patch"]["weight"]}, grid, heads=4),
    ):
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value))
    return messages


def test_what_does_not_divide_is_named(processes):
    for messages in processes(4, misfits):
        assert messages == [
            *["the mesh has tensor=4, but the 6 heads of the attention divide over 1, 2, 3, 6 processes only"] * 2,
            "an image of 1 token cannot be divided over sequence=4 processes: there must be a token for each",
            "6 heads do not divide over 4 processes: gathered_attention takes any number of them",
            "more is in no spec of a network, so that it is not known how it is divided",
        ]


def part_of_init(sizes):
    mesh, key = meshes.init(sizes), prng.key(3)
    from functional_sd3.core import spec as specs

    own = specs.init(key, tensor.part_spec(SPEC, mesh, heads=CONFIG.heads))
    whole = tensor.cut(specs.init(key, SPEC), SPEC, mesh, heads=CONFIG.heads)
    return tree.diff(own, whole)


def test_a_part_is_initialised_as_that_part_of_the_whole(processes):
    assert processes(2, part_of_init, {"tensor": 2}) == [[], []]


def attention_both(heads, sizes):
    """Both attentions of random streams against one process, with image queries of their own length, and a context
    with and without queries."""
    mesh = meshes.init({"sequence": len(sizes)})
    group = mesh.group("sequence")
    keys = prng.split(prng.key(heads), 2)
    image = attention.Stream(*prng.normal(keys[0], (3, 2, heads, sum(sizes), 4)))
    context = attention.Stream(*prng.normal(keys[1], (3, 2, heads, 3, 4)))
    first = sum(sizes[: mesh.index("sequence")])
    own = attention.Stream(*(part.narrow(2, first, sizes[mesh.index("sequence")]) for part in image))
    errors = []
    for others in ([], [context], [context._replace(query=None)]):
        wanted, *rest = attention.joint_attention([image, *others])
        for make in (sequence.gathered_attention, sequence.ulysses_attention):
            if make is sequence.ulysses_attention and heads % len(sizes):
                continue
            attended, *own_rest = make(group, sizes)([own, *others])
            pairs = [(wanted.narrow(2, first, attended.shape[2]), attended), *zip(rest, own_rest, strict=True)]
            errors += [float((a - b).abs().max()) for a, b in pairs if a is not None]
            assert [a is None for a, _ in pairs] == [b is None for _, b in pairs]
    return max(errors)


@pytest.mark.parametrize(("heads", "sizes"), [(4, (3, 3)), (4, (5, 2)), (3, (1, 4))], ids=str)
def test_divided_attention_is_joint_attention(processes, heads, sizes):
    assert max(processes(2, attention_both, heads, sizes)) < 1e-6
