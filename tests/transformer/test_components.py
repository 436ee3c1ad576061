"""What a person gives in place of one component's parameters, config or time is named, with what would be right."""

import pytest
import torch
from torch.func import grad, vmap

from functional_sd3 import pipeline, weights
from functional_sd3.core import prng
from functional_sd3.image import vae
from functional_sd3.text import t5
from functional_sd3.text.clip import text as clip
from functional_sd3.training import objectives
from functional_sd3.transformer import mmdit
from functional_sd3.weights import shipped

IDS = torch.ones(1, 4, dtype=torch.int64)
X, T = torch.zeros(1, 16, 2, 2), torch.tensor([0.5])
CALLS = {
    "transformer": lambda params, config, t=T: mmdit.apply(
        params, config, X, t, torch.zeros(1, 3, 192), torch.zeros(1, 192)
    ),
    "vae": lambda params, config: (
        vae.decode(params, config, X),
        vae.encode(params, config, torch.zeros(1, 3, 16, 16)),
    ),
    "clip_l": lambda params, config: clip.apply(params, config, IDS),
    "t5": lambda params, config: t5.apply(params, config, IDS),
}


@pytest.fixture(scope="module")
def model():
    return weights.load(shipped.folder(), dtype=torch.float32)


@pytest.mark.parametrize("name", CALLS)
def test_the_parameters_or_the_config_of_a_whole_model_are_no_components(model, name):
    params, config = model.params[name], getattr(model.config, name)
    CALLS[name](params, config)
    with pytest.raises(ValueError, match=rf"params are of \['clip_l', .*model.params\['{name}'\]"):
        CALLS[name](model.params, config)
    with pytest.raises(ValueError, match="params are a Model, without"):
        CALLS[name](model, config)
    with pytest.raises(ValueError, match=rf"config is a functional_sd3.*model.config.{name}"):
        CALLS[name](params, model.config)


def test_an_objective_takes_the_parameters_of_the_model_by_component(model):
    batch = {"latents": X, "context": torch.zeros(1, 3, 192), "pooled": torch.zeros(1, 192)}
    with pytest.raises(ValueError, match=r"an objective takes \{'transformer': ...\}"):
        objectives.flow_loss(model.config)(model.params["transformer"], batch, prng.split(prng.key(0), 1))


def test_a_timestep_up_to_1000_is_no_time(model):
    params, config = model.params["transformer"], model.config.transformer
    with pytest.raises(ValueError, match=r"t of 500 must be in \[0, 1\].*divided by 1000"):
        CALLS["transformer"](params, config, torch.tensor([500.0]))
    # Its values are not read under transforms.
    run = lambda t: CALLS["transformer"](params, config, t[None]).sum()  # noqa: E731
    assert vmap(grad(run))(torch.tensor([0.5, 1.0])).isfinite().all()


def test_a_guidance_by_its_name_is_an_error_that_says_where_guidances_are(model):
    with pytest.raises(ValueError, match=r"guidance 'cfg' must be .*guidance.cfg\(5.0\)"):
        pipeline.generate(*model, "a red circle", prng.key(0), steps=1, guidance="cfg")
