"""An ensemble of LoRAs by vmap: what a fine-tuning taught, and where its members only disagree.

Four LoRAs learn the same eight images, large red circles in the upper left, from other factors, in another order, with
other noise. Their trees are stacked leaf by leaf: one vmap trains all over one base (`lora.apply(lazy=True)`), another
predicts with all. Where their mean velocity moved further than they lie apart, they agree on what they learned.
"""

import torch
from torch import Tensor
from torch.func import grad, vmap

import functional_sd3 as sd3

THINGS = ("large red circle", "large red square", "large blue circle", "small green star")


def main(members: int = 4, updates: int = 36, batch: int = 4, noises: int = 6, t: float = 0.9) -> dict[str, float]:
    """|mean - base| / spread of the members' velocities for each prompt; the first is that of the training images."""
    params, config, tokenizers = sd3.weights.load(sd3.shipped.folder(), dtype=torch.float32)
    places = [sd3.shapes.Thing("large", "red", "circle", 16.0 + n % 3, 16.0 + n // 3) for n in range(8)]
    drawn = [sd3.shapes.draw(sd3.shapes.Scene((thing,), "white")) for thing in places]
    prompts = [f"a {thing} on a white background" for thing in THINGS]
    with torch.no_grad():
        latents = sd3.pipeline.encode_images(params, config, sd3.pixels.from_pil(drawn))
        texts = sd3.pipeline.encode(params, config, tokenizers, prompts).positive
    flow, adapted = sd3.losses.flow_loss(config), lambda lora: sd3.lora.apply(params, lora, lazy=True)
    learned = {name: part[:1].expand(batch, *part.shape[1:]) for name, part in texts._asdict().items()}

    def loss(lora, images: Tensor, keys: Tensor) -> Tensor:
        return flow(adapted(lora), {"latents": images, **learned}, keys)[0]

    init_key, data_key, noise_key = sd3.prng.split(sd3.prng.key(0), 3).unbind()
    loras = [sd3.lora.init(key, config, rank=4) for key in sd3.prng.split(init_key, members)]
    stacked = sd3.tree.map(lambda *leaves: torch.stack(leaves), *loras)
    optimizer = sd3.optim.adamw(3e-3)
    state = optimizer.init(stacked)
    for update in range(updates):
        keys = sd3.prng.split(sd3.prng.fold_in(noise_key, update), members * batch).unflatten(0, (members, batch))
        images = latents[sd3.prng.randint(sd3.prng.fold_in(data_key, update), (members, batch), 0, len(drawn))]
        changes, state = optimizer.update(vmap(grad(loss))(stacked, images, keys), state, stacked)
        stacked = sd3.optim.apply_updates(stacked, changes)

    x = sd3.pipeline.initial_noise(noise_key, config, noises).repeat(len(prompts), 1, 1, 1)
    inputs = x, torch.tensor(t), *(part.repeat_interleave(noises, 0) for part in texts)

    def velocity(params: dict) -> Tensor:
        return sd3.mmdit.apply(params["transformer"], config.transformer, *inputs).reshape(len(prompts), -1)

    with torch.no_grad():
        velocities, base = vmap(lambda lora: velocity(adapted(lora)))(stacked), velocity(params)
    moved, spread = (velocities.mean(0) - base).square().mean(1).sqrt(), velocities.var(0).mean(1).sqrt()
    for thing, *numbers in zip(THINGS, moved, spread, moved / spread, strict=True):
        print(f"{thing}: " + "moved by {:.3f}, spread {:.3f}, ratio {:.1f}".format(*numbers), flush=True)
    return dict(zip(THINGS, (moved / spread).tolist(), strict=True))


if __name__ == "__main__":
    main()
