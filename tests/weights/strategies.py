"""Random configs of whole models, some of whose components are absent."""

from dataclasses import replace

import torch
from hypothesis import strategies as st

from functional_sd3 import weights
from functional_sd3.flow import schedule
from functional_sd3.image import taesd, vae
from functional_sd3.text import clip, t5
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
small = st.integers(1, 3)


@st.composite
def configs(draw):
    heads, depth, groups = draw(small), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    texts = {
        name: clip.Config(
            vocab=draw(st.integers(4, 9)),
            length=draw(st.integers(2, 5)),
            width=4 * heads,
            layers=draw(small),
            heads=heads,
            mlp_width=draw(small),
            projection_width=draw(small),
            activation=draw(st.sampled_from(sorted(clip.ACTIVATIONS))),
            eos_id=draw(small),
        )
        for name in ("clip_l", "clip_g")
    }
    whole = Config(
        **texts,
        t5=t5.Config(vocab=draw(small), width=draw(small), layers=draw(small), heads=heads, head_dim=2, mlp_width=3),
        transformer=mmdit.Config(
            depth=depth,
            heads=heads,
            head_dim=4,
            in_channels=draw(small),
            out_channels=draw(small),
            context_width=draw(small),
            pooled_width=draw(small),
            position_size=draw(small),
            sample_size=draw(st.integers(2, 9)),
            qk_norm=draw(st.booleans()),
            dual_attention_layers=tuple(sorted(draw(st.sets(st.integers(0, depth - 1))))),
        ),
        vae=vae.Config(
            channels=tuple(groups * draw(small) for _ in range(draw(small))),
            blocks_per_level=draw(small),
            latent_channels=draw(small),
            groups=groups,
            scaling=draw(st.floats(0.1, 9)),
            shift=draw(st.floats(-1, 1)),
        ),
        schedule=schedule.Config(shift=draw(st.floats(0.5, 9)), use_dynamic_shifting=draw(st.booleans())),
        taesd=taesd.Config(
            width=draw(small),
            latent_channels=draw(small),
            encoder_blocks=tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))),
            decoder_blocks=tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))),
        ),
    )
    absent = draw(st.sets(st.sampled_from(list(weights.SPECS) + ["schedule"]), max_size=4))
    return replace(whole, **dict.fromkeys(absent))
