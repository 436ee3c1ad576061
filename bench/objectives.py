"""What `train --inversion` and `train --control` learn on params/tiny: `python -m bench.objectives word|control`

word: images of one thing in a colour of the palette, whose name is replaced by <blorp> in their captions; the word
starts from another colour, and the share of images of held-out captions in which the thing has the colour is read
before and after. control: a ControlNet for canny edges; the share of edges that are within a pixel of each other, of
held-out scenes and of what is drawn of their captions with and without it. Both print the processor time of training.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3 import cli, pipeline, weights
from functional_sd3.core import prng
from functional_sd3.image import canny, pixels
from functional_sd3.recipes import shapes
from functional_sd3.recipes.shapes import prompts
from functional_sd3.text import textual_inversion
from functional_sd3.transformer.control import Control
from functional_sd3.weights import shipped

WORD = "<blorp>"
SIDE = 64


def trained(words: Sequence[str]) -> float:
    """Seconds of processor time of a training run."""
    started = time.process_time()
    if status := cli.main(["train", "--quiet", *words]):
        sys.exit(status)
    return time.process_time() - started


def scenes_with(colour: str, count: int, *, held_out: bool, key: Tensor) -> list:
    """Scenes of one thing in a colour, of the captions that params/tiny was trained on or of the held-out ones."""
    found: list = []
    while len(found) < count:
        key, drawn = prng.split(key)
        scenes = shapes.scenes(drawn, 512, two=0.0, hold_out=False)
        found += [scene for scene in scenes
                  if scene.things[0].colour == colour and shapes.is_held_out(scene) == held_out]  # fmt: skip
    return found[:count]


def word(out: Path, count: int, options: list[str], colour: str = "orange", initial: str = "red") -> None:
    """A new word for a colour."""
    data = out / "images"
    data.mkdir(parents=True)
    for index, scene in enumerate(scenes_with(colour, 32, held_out=False, key=prng.key(1))):
        shapes.draw(scene, SIDE).save(data / f"{index}.png")
        (data / f"{index}.txt").write_text(shapes.caption(scene).replace(colour, WORD))
    base = ["--data", str(data), "--out", str(out / "word"), "--inversion", WORD, "--initial-word", initial]
    seconds = trained([*base, *options])
    model = weights.load(shipped.folder(), dtype=torch.float32)
    learned = weights.load_inversion(out / "word" / "learned_embeds.safetensors", token=WORD)
    vectors = textual_inversion.initial_vectors(
        model.params, model.tokenizers, initial, list(learned.vectors), len(learned.vectors["clip_l"])
    )
    held_out = scenes_with(colour, count, held_out=True, key=prng.key(2))
    texts = [shapes.caption(scene).replace(colour, WORD) for scene in held_out]
    print(f"trained for {seconds:.0f} seconds of processor time")
    for words, each in (("before", learned._replace(vectors=vectors)), ("after", learned)):
        added = textual_inversion.add(*model, each)
        with torch.no_grad():
            images = torch.cat([
                pipeline.generate(*added, texts[start : start + 16], prng.fold_in(prng.key(3), start), t5_length=24)
                for start in range(0, count, 16)
            ])  # fmt: skip
        verdicts = prompts.verdicts(images, held_out)
        shares = [sum(getattr(each, name) for each in verdicts) / count for name in ("colour", "right")]
        print(f"{words}: {shares[0]:.1%} in {colour}, {shares[1]:.1%} with everything right, of {count}")


def near(edges: Tensor, others: Tensor) -> float:
    """F1 of edges (batch, 1, height, width), a pixel of which counts where the others have one within a pixel."""
    a, b = edges.float() / 255, others.float() / 255
    wide = [F.max_pool2d(each, 3, 1, 1) for each in (a, b)]
    precision, recall = float((a * wide[1]).sum() / a.sum()), float((b * wide[0]).sum() / b.sum())
    return 2 * precision * recall / max(precision + recall, 1e-9)


def control(out: Path, count: int, options: list[str]) -> None:
    """A ControlNet for canny edges."""
    seconds = trained(["--data", "shapes", "--out", str(out / "canny"), "--control", "canny", *options])
    model, net = weights.load(shipped.folder(), dtype=torch.float32), weights.load_controlnet(out / "canny")
    held_out = [scene for scene in shapes.scenes(prng.key(2), 40 * count, hold_out=False) if shapes.is_held_out(scene)]
    held_out = held_out[:count]
    drawn = pixels.from_pil([shapes.draw(scene, SIDE) for scene in held_out])
    edges = canny.edges(pixels.to_bytes(drawn))
    texts = [shapes.caption(scene) for scene in held_out]
    print(f"trained for {seconds:.0f} seconds of processor time")
    with torch.no_grad():
        inputs = pixels.from_bytes(edges.expand(-1, 3, -1, -1))
        latents = pipeline.control_latents(model.params, model.config, inputs, net.config)
        for words, scale in (("without", None), ("with", 1.0)):
            parts = []
            for start in range(0, count, 16):
                part = slice(start, start + 16)
                controls = [] if scale is None else [Control(net.params, net.config, latents[part], scale)]
                key = prng.fold_in(prng.key(3), start)
                parts.append(pipeline.generate(*model, texts[part], key, t5_length=24, control=controls))
            images = torch.cat(parts)
            right = sum(verdict.right for verdict in prompts.verdicts(images, held_out)) / count
            found = canny.edges(pixels.to_bytes(images))
            print(f"{words} the ControlNet: {near(found, edges):.1%} of edges, {right:.1%} right, of {count}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("word", "control"))
    parser.add_argument("--count", type=int, default=64, help="held-out images that are drawn (default 64)")
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as out:
        {"word": word, "control": control}[arguments.what](Path(out), arguments.count, options)


if __name__ == "__main__":
    main()
