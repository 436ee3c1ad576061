"""Small models to train."""

from types import SimpleNamespace

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.core import prng
from functional_sd3.core import spec as specs
from functional_sd3.flow import schedule
from functional_sd3.image import vae
from functional_sd3.recipes import shapes
from functional_sd3.text import bpe, clip, conditioning, t5, unigram
from functional_sd3.transformer import mmdit


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """config, params, batch and empty of a model of 30,000 parameters, with two text encoders and 4 x 4 latents."""
    config = weights.Config(
        clip_l=clip.Config(
            vocab=40, length=6, width=16, layers=2, heads=2, mlp_width=16, projection_width=16, eos_id=39
        ),
        t5=t5.Config(vocab=40, width=32, layers=1, heads=2, head_dim=8, mlp_width=16),
        transformer=mmdit.Config(
            depth=2,
            heads=2,
            head_dim=8,
            patch_size=1,
            context_width=32,
            pooled_width=32,
            position_size=4,
            sample_size=4,
            qk_norm=True,
        ),
    )
    described = weights.spec(config)
    # The final layer starts at zero, behind which no gradient would be seen.
    params = specs.init(prng.key(0), specs.map_params(_nonzero, described))
    ids = conditioning.Ids(
        *(
            prng.randint(prng.fold_in(prng.key(1), index), (4, 6), 0, 40)
            for index in range(len(conditioning.Ids._fields))
        )
    )
    batch = {"latents": prng.normal(prng.key(2), (4, 16, 4, 4)), "ids": ids}
    empty = {"ids": conditioning.Ids(*(torch.zeros(1, 6, dtype=torch.int64) for _ in ids))}
    return SimpleNamespace(config=config, spec=described, params=params, batch=batch, empty=empty)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A whole model with tokenizers in a folder, in float16, for images of 16 pixels a side."""
    captions = [shapes.caption(scene, index) for index, scene in enumerate(shapes.scenes(prng.key(0), 60))]
    tables = bpe.init(bpe.train(captions, 560), model_max_length=16)
    charsmap = unigram.plain_charsmap()
    pieces = unigram.from_pieces(unigram.train(captions, 80, charsmap=charsmap), charsmap=charsmap, model_max_length=16)
    config = weights.Config(
        clip_l=clip.Config(
            vocab=len(tables.vocab),
            length=16,
            width=16,
            layers=2,
            heads=2,
            mlp_width=16,
            projection_width=16,
            eos_id=tables.eos_id,
        ),
        t5=t5.Config(vocab=len(pieces.pieces), width=32, layers=1, heads=2, head_dim=8, mlp_width=16),
        transformer=mmdit.Config(
            depth=1,
            heads=2,
            head_dim=8,
            patch_size=1,
            context_width=32,
            pooled_width=32,
            position_size=2,
            sample_size=2,
        ),
        vae=vae.Config(channels=(4, 4, 8, 8), blocks_per_level=1, groups=2, sample_size=16),
        schedule=schedule.Config(shift=1.0),
    )
    params = specs.init(prng.key(1), weights.spec(config), dtype=torch.float16)
    folder = tmp_path_factory.mktemp("model")
    weights.save(folder, weights.Model(params, config, weights.Tokenizers(clip_l=tables, t5=pieces)))
    return folder


@pytest.fixture
def command(model_folder, capsys):
    """`functional-sd3 train` with a few small settings; answers (exit status, standard error)."""
    import argparse

    from functional_sd3.cli import train

    def run(*words):
        parser = argparse.ArgumentParser()
        train.add_arguments(parser)
        params = [] if "--params" in words else ["--params", model_folder]
        base = [*params, "--data", "shapes", "--pictures", "12", "--steps", "6", "--batch-size", "4"]
        small = ["--save-every", "3", "--log-every", "2", "--sample-every", "0", "--warmup", "2", "--lr", "1e-2"]
        status = train.run(parser.parse_args([str(word) for word in (*base, *small, *words)]))
        return status, capsys.readouterr().err

    return run


def _nonzero(path: str, param: specs.Param) -> specs.Param:
    return specs.Param(param.shape, specs.normal(0.1), param.axes, param.trainable) if param.trainable else param
