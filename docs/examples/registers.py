"""Runs a block of a transformer with a third stream, register tokens, and reads what the image's tokens attend to.

    python docs/examples/registers.py

Register tokens (Darcet et al. 2023, arXiv:2309.16588) are learned tokens that belong to no patch. As a stream of the
joint attention they have weights and modulations of their own, and start so that their output is what they were.
"""

import argparse

import torch
from torch import Tensor

import functional_sd3 as sd3
from functional_sd3.transformer.embeddings import embed_condition


def with_registers(key: Tensor, block: dict, config: sd3.mmdit.Config) -> dict:
    """The block's parameters and those of a stream of registers."""
    stream = sd3.joint_block.stream_spec(config.width, config.head_dim, qk_norm=config.qk_norm)
    return {**block, "registers": sd3.spec.init(key, stream)}


def main(seed: int = 0, count: int = 4) -> dict[str, float]:
    """Shares of an image token's attention in each stream, means over heads and tokens."""
    model = sd3.weights.load(sd3.shipped.folder(), dtype=torch.float32)
    config, params = model.config.transformer, model.params["transformer"]
    keys = sd3.prng.split(sd3.prng.key(seed), 3)
    context, pooled = sd3.conditioning.apply(model.params, model.config, model.tokenizers, ["a red circle"])
    latents = sd3.pipeline.initial_noise(keys[0], model.config, 1)
    t = torch.tensor([0.7])
    condition = embed_condition(params, config.pooled_width, t, pooled)
    streams = {
        "image": sd3.mmdit.embed_image(params, config, latents),
        "context": torch.nn.functional.linear(context, params["context"]["weight"], params["context"]["bias"]),
        "registers": sd3.prng.normal(keys[1], (1, count, config.width)),
    }
    block = with_registers(keys[2], params["blocks"][0], config)

    def run(attend):
        return sd3.joint_block.apply(block, config.heads, streams, condition, attend=attend[0])

    result, maps = sd3.attention.maps(run, blocks=[0])
    assert torch.equal(result["registers"], streams["registers"])  # not trained yet
    joint = maps[0][0]
    return {name: float(joint.between(0, index).sum(-1).mean()) for index, name in enumerate(streams)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=4, help="register tokens")
    for name, share in main(**vars(parser.parse_args())).items():
        print(f"{name}: {share:.3f}")
