"""The config of a whole model, and of one component that a caller needs."""

import pytest

from functional_sd3.image import vae
from functional_sd3.layouts import components


def test_the_config_of_a_component_is_returned():
    sizes = vae.Config(latent_channels=4)
    assert components.require(components.Config(vae=sizes), "vae") is sizes


@pytest.mark.parametrize("name", components.SPECS)
def test_an_absent_component_is_named_with_the_files_that_hold_it(name):
    with pytest.raises(ValueError, match=f"no {name} .found in: {components.WHERE[name].split()[0]}"):
        components.require(components.Config(), name)
