"""Peak memory of a training step of the shipped model for every choice of docs/training.md, beside its estimate.

    python -m bench.training_memory

A row a choice: MiB that stay (what learns, its moments and average, the base of a LoRA), MiB that a step adds at its
peak, and both by `train --estimate`. On a CPU, as PyTorch's allocator sees it; text encoders and VAE are not counted.
"""

import argparse
import tempfile

import torch

from bench.timing import allocated_peak
from functional_sd3 import weights
from functional_sd3.cli import train, train_setup
from functional_sd3.core import tree
from functional_sd3.training import estimate
from functional_sd3.training.memory_choice import Choice
from functional_sd3.training.update_rule import UpdateRule
from functional_sd3.weights import shipped

MIB = 2**20
BF16 = torch.bfloat16
LEAN = UpdateRule("adamw8bit", BF16)
ROWS = {
    "": {},
    "--dtype bfloat16": {"dtype": BF16},
    "--remat": {"remat": True},
    "--remat --dtype bfloat16": {"remat": True, "dtype": BF16},
    "--remat --dtype bfloat16 --optimizer adamw8bit": {"remat": True, "dtype": BF16, "rule": UpdateRule("adamw8bit")},
    "--remat --weights bfloat16 --optimizer adamw8bit": {"remat": True, "rule": LEAN},
    "--remat --weights bfloat16 --optimizer adamw8bit --fused-update": {
        "remat": True,
        "rule": UpdateRule("adamw8bit", BF16, True),
    },
    "--lora 8 --dtype bfloat16": {"lora": 8, "dtype": BF16},
    "--lora 8 --dtype bfloat16 --remat": {"lora": 8, "dtype": BF16, "remat": True},
    "--lora 8 --dtype bfloat16 --base int8": {"lora": 8, "dtype": BF16, "base": True},
    "--lora 8 --dtype bfloat16 --block-swap 4": {"lora": 8, "dtype": BF16, "swapped": 4},
}
BATCH = 32


def measure(words: str) -> tuple[float, float]:
    """MiB that stay in memory, and those that a step adds at its peak."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    base = ["--data", "shapes", "--pictures", str(BATCH), "--batch-size", str(BATCH), "--device", "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = parser.parse_args([*base, "--out", folder, *words.split()])
        load, kept = train_setup.train_model.load, 0

        def counted(*given):
            nonlocal kept
            stored, model, dtype = load(*given)
            if arguments.lora:
                blocks = model.params["transformer"]["blocks"]
                first = len(blocks) - (arguments.block_swap or 0)
                kept = tree.nbytes({**model.params["transformer"], "blocks": blocks[:first]})
            return stored, model, dtype

        train_setup.train_model.load = counted
        try:
            task = train_setup.prepare(arguments, lambda text: None).task
        finally:
            train_setup.train_model.load = load
        added = allocated_peak(lambda: task.train_step(task.state, task.batch(0)))
    return (tree.nbytes(task.state) + kept) / MIB, added / MIB


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    model = weights.outline(shipped.folder())
    sizes = model.config.transformer
    assert sizes is not None and model.config.clip_l is not None and model.tokenizers.t5 is not None
    tokens = model.config.clip_l.length + model.tokenizers.t5.model_max_length
    config = weights.Config(transformer=sizes)
    print(f"params/tiny, {BATCH} images a step, MiB: stays + added at the peak of a step = sum (--estimate)")
    for words, options in ROWS.items():
        stays, added = measure(words)
        needed = estimate.memory(config, Choice(batch=BATCH, side=sizes.sample_size, tokens=tokens, **options))
        sums = f"{stays:6.1f} + {added:6.1f} = {stays + added:6.1f} ({needed.total / MIB:.1f})"
        print(f"{words or 'float32, adamw':66s} {sums}")


if __name__ == "__main__":
    main()
