"""The Inception network as a function; its numbers are held to the packages in tests/parity/test_metrics_parity.py."""

import hashlib

import pytest
import torch

from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.metrics import inception
from functional_sd3.metrics.inception import network as network_definition
from tests.metrics import references


@pytest.fixture(scope="module")
def network():
    return references.random_params()


@pytest.fixture(scope="module")
def images():
    return references.images() / 255 * 2 - 1


PUBLISHED = "bd04e829988dd22dd0bbf9e499a87af311ed57c1b4309a9d20a907d8ed4123d4"
"""SHA-256 of the names and shapes of pt_inception-2015-12-05-6726825d.pth but for its counters of batches, as below."""


def test_the_spec_has_the_leaves_of_the_published_file():
    leaves = sorted(specs.paths(inception.spec()).items())
    text = "\n".join(f"{path} {list(param.shape)}" for path, param in leaves)
    assert hashlib.sha256(text.encode()).hexdigest() == PUBLISHED


def test_the_spec_counts_the_published_parameters():
    assert len(specs.paths(inception.spec())) == 472
    assert specs.count(inception.spec()) == 23_885_392


def test_init_follows_the_spec():
    params = inception.init(prng.key(0), device="meta")
    assert not specs.check(inception.spec(), tree.flatten_paths(params))


def test_taps_have_their_widths_and_features_do_not_depend_on_the_batch(network, images):
    both, one = inception.apply(network, images), inception.apply(network, images[1:])
    assert {name: tuple(part.shape) for name, part in both.items()} == {
        **{tap: (2, tap) for tap in (64, 192, 768, 2048)},
        "logits": (2, 1008),
    }
    for name, part in one.items():
        torch.testing.assert_close(part, both[name][1:], rtol=1e-4, atol=1e-5)


def test_the_last_block_pools_the_maximum_and_no_average_counts_the_padding(network):
    # The goldens would show it too; here is what they would show.
    padded = torch.ones(1, 1, 4, 4)
    averages = [step for step in _pools(network_definition._NETWORK) if step is network_definition._mean]
    maxima = [step for step in _pools(network_definition._NETWORK) if step is network_definition._maximum]
    assert len(averages) == 8 and len(maxima) == 1
    assert torch.equal(network_definition._mean(padded), padded)


def _pools(steps):
    for step in steps:
        if isinstance(step, network_definition.Pool):
            yield step.apply
        elif isinstance(step, network_definition.Block):
            yield from _pools((step.branches,))
        elif isinstance(step, network_definition.Branches):
            for branch in step.steps:
                yield from _pools(branch)


def test_arguments_are_left_as_they_were(network, images):
    before, weight = images.clone(), network["Conv2d_1a_3x3"]["conv"]["weight"].clone()
    inception.apply(network, images)
    assert torch.equal(images, before) and torch.equal(network["Conv2d_1a_3x3"]["conv"]["weight"], weight)


def test_features_can_be_differentiated_and_mapped(network, images):
    one = images[:1]

    def feature(x):
        return inception.apply(network, x)[192].sum()

    gradient = torch.func.grad(feature)(one)
    # A step along the gradient changes the feature as the gradient says.
    step = 1e-3 * gradient / gradient.norm()
    change = (feature(one + step) - feature(one - step)) / 2
    assert float(change) == pytest.approx(float((gradient * step).sum()), rel=0.05)
    _, slope = torch.func.jvp(feature, (one,), (step,))
    assert float(slope) == pytest.approx(float((gradient * step).sum()), rel=1e-3)
    mapped = torch.func.vmap(lambda x: inception.apply(network, x[None])[192][0])(one)
    torch.testing.assert_close(mapped, inception.apply(network, one)[192], rtol=1e-4, atol=1e-5)


def test_the_norms_are_the_affine_map_of_their_stored_statistics(network, images):
    unit = network["Conv2d_1a_3x3"]
    plain = torch.nn.functional.conv2d(images, unit["conv"]["weight"], stride=2)
    norm = unit["bn"]
    wanted = torch.nn.functional.batch_norm(
        plain, norm["running_mean"], norm["running_var"], norm["weight"], norm["bias"], training=False, eps=1e-3
    ).relu()
    result = network_definition._unit(unit, network_definition._NETWORK[0], images)
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)


def test_wrong_images_are_refused(network):
    with pytest.raises(ValueError, match=r"\[1, 3, 256, 256\] must be \(batch, 3, 299, 299\)"):
        inception.apply(network, torch.zeros(1, 3, 256, 256))
    with pytest.raises(ValueError, match="uint8 must be floating"):
        inception.apply(network, torch.zeros(1, 3, 299, 299, dtype=torch.uint8))


def test_the_fingerprint_is_of_the_values_and_their_places(network):
    actual = inception.fingerprint(network)
    assert actual == inception.fingerprint(dict(reversed(list(network.items())))) and len(actual) == 64
    changed = {**network, "fc": {**network["fc"], "bias": network["fc"]["bias"] + 1}}
    assert inception.fingerprint(changed) != actual
