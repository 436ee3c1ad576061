"""Train a part of a model on a folder of pictures, or on the world of shapes."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

HELP = "train the transformer or the autoencoder of a model, or a LoRA"
KEEP = 3
"""Checkpoints kept."""
ENCODED = "data.safetensors"
LORA = "pytorch_lora_weights.safetensors"
"""The name under which diffusers finds a LoRA in a folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="DIR|shapes", help="folder of pictures, or the built-in shapes")
    add("--out", required=True, metavar="DIR", help="folder for the trained model, its log and checkpoints")
    add("--params", metavar="DIR", help="model to start from (default: the shipped tiny one)")
    add("--part", choices=("transformer", "vae"), default="transformer", help="what is trained (default transformer)")
    add("--lora", type=int, metavar="RANK", help="train a LoRA of the attentions, and leave it in --out as a file")
    add("--scratch", action="store_true", help="fresh parameters of the same sizes")
    add("--steps", type=int, default=1000, help="steps in all (default 1000)")
    add("--batch-size", type=int, default=16, help="pictures a step (default 16)")
    add("--lr", type=float, default=1e-4, help="peak learning rate; a cosine takes it to a tenth (default 1e-4)")
    add("--warmup", type=int, default=50, help="steps up to the peak (default 50)")
    add("--seed", type=int, default=0, help="of the data, the order and the noise (default 0)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, to the same bits")
    add("--accumulate", type=int, default=1, help="parts that a batch is taken in, to save memory (default 1)")
    add("--dropout", type=float, default=0.1, help="share of captions emptied, for guidance (default 0.1)")
    add("--ema", type=float, default=0.999, help="decay of the averaged parameters (default 0.999)")
    trained = "whether they learn with the transformer (default: frozen, with --scratch train)"
    add("--text-encoders", choices=("frozen", "train"), help=trained)
    add("--decoder-only", action="store_true", help="leave the autoencoder's encoder alone, so that latents stay")
    add("--size", type=int, help="side of the pictures in pixels (default: the model's own)")
    add("--template", default="a photo of a {}", help="caption of a class folder (default 'a photo of a {}')")
    add("--pictures", type=int, default=8192, help="how many of the shapes (default 8192)")
    add("--save-every", type=int, default=250, help="steps between checkpoints (default 250)")
    add("--log-every", type=int, default=10, help="steps between rows of log.csv (default 10)")
    add("--sample-every", type=int, default=250, help="steps between sample pictures, 0 for none (default 250)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation (default float32)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--compile", action="store_true", help="compile the step: minutes once, then faster")


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    out, checkpoints = Path(arguments.out), Path(arguments.out) / "checkpoints"
    if arguments.data != "shapes" and not Path(arguments.data).is_dir():
        raise ValueError(f"--data {arguments.data} is not a folder; give a folder of pictures, or the word shapes")

    from functional_sd3.training import checkpoint, loop, lora

    saved = _saved(checkpoint.found(checkpoints), arguments)
    stored, model, source = _model(arguments)
    pictures = _pictures(arguments, model)
    settings = _settings(arguments, source, pictures.fingerprint)
    if saved:
        _check_same(checkpoint.settings(saved), settings, out)
    out.mkdir(parents=True, exist_ok=True)
    part = _part(arguments, model, pictures, checkpoints / ENCODED)
    state = part.state
    _check_disk(out, state, model)
    if saved:
        state = checkpoint.load(saved, like=state)
        print(f"resuming at step {int(state.step)} of {arguments.steps}", file=sys.stderr)

    def on_sample(current, done: int) -> None:
        _save_picture(out / "samples" / f"{done:08d}.png", part.sample(current))

    outcome = loop.run(
        state,
        part.train_step,
        part.batch,
        steps=arguments.steps,
        out=out,
        settings=settings,
        save_every=arguments.save_every,
        log_every=arguments.log_every,
        sample_every=arguments.sample_every,
        on_sample=on_sample if arguments.sample_every else None,
        keep=KEEP,
        progress=sys.stderr.isatty(),
    )
    if outcome.reason == "interrupted":
        done = int(outcome.state.step)
        where = f"stopped at step {done}, saved in {checkpoints}"
        print(f"{where}; the same command with --resume goes on", file=sys.stderr)
        return 130
    if arguments.lora:
        lora.save(out / LORA, outcome.state.ema)
    else:
        _save_model(out, part.model(outcome.state), stored)
    print(out / LORA if arguments.lora else out)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    lowest = {"steps": 1, "batch_size": 1, "accumulate": 1, "warmup": 0, "pictures": 1, "save_every": 1, "log_every": 1}
    for name, least in (lowest | {"sample_every": 0}).items():
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least {least}")
    if not 0 < arguments.lr < float("inf"):
        raise ValueError(f"--lr {arguments.lr} must be a positive number")
    for name in ("dropout", "ema"):
        if not 0 <= getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)} must be at least 0 and below 1")
    if arguments.batch_size % arguments.accumulate:
        raise ValueError(f"--batch-size {arguments.batch_size} cannot be taken in {arguments.accumulate} equal parts")
    if arguments.lora is not None and arguments.lora < 1:
        raise ValueError(f"--lora {arguments.lora} must be a rank of at least 1")
    if arguments.lora and (arguments.scratch or arguments.part == "vae"):
        raise ValueError("--lora adapts a transformer that is there: neither --scratch nor --part vae goes with it")
    if arguments.part == "vae" and arguments.text_encoders:
        raise ValueError("--text-encoders belongs to --part transformer")
    if arguments.part == "transformer" and arguments.decoder_only:
        raise ValueError("--decoder-only belongs to --part vae")


def _saved(found: list[Path], arguments: argparse.Namespace) -> Path | None:
    if arguments.resume and not found:
        raise ValueError(f"--resume found no checkpoint in {arguments.out}/checkpoints; leave it out to begin there")
    if found and not arguments.resume:
        raise ValueError(f"--out {arguments.out} holds a run already: --resume goes on with it; or name another folder")
    return found[-1] if found else None


def _model(arguments: argparse.Namespace):
    """The model as it is stored, what training reads of it in float32, and the folder it came from."""
    import torch

    from functional_sd3 import weights
    from functional_sd3.cli import runtime
    from functional_sd3.core import tree
    from functional_sd3.weights import shipped

    source = Path(arguments.params) if arguments.params else shipped.folder()
    device = runtime.device(arguments.device)
    stored = weights.load(source)
    runtime.require(stored, ("transformer", "vae") if arguments.part == "transformer" else ("vae",), source)
    names = [name for name in stored.params if arguments.part == "transformer" or name == "vae"]
    params = tree.to(tree.cast({name: stored.params[name] for name in names}, torch.float32), device)
    return stored, stored._replace(params=params), source


def _pictures(arguments: argparse.Namespace, model):
    from functional_sd3 import pipeline
    from functional_sd3.core import prng
    from functional_sd3.training import datasets, parts

    if arguments.part == "vae":
        side = arguments.size or model.config.vae.sample_size
    else:
        from functional_sd3.image import vae

        side = pipeline.latent_size(model.config, arguments.size, arguments.size)[0] * vae.factor(model.config.vae)
    if arguments.data == "shapes":
        return parts.shapes_pictures(prng.key(arguments.seed), arguments.pictures, side)
    index = datasets.image_folder(arguments.data, template=arguments.template)
    print(f"{len(index.samples)} pictures in {arguments.data}", file=sys.stderr)
    for path, reason in index.skipped[:10]:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    if len(index.skipped) > 10:
        print(f"skipped {len(index.skipped) - 10} more, {len(index.skipped)} in all", file=sys.stderr)
    return parts.folder_pictures(index, side)


def _settings(arguments: argparse.Namespace, source: Path, fingerprint: str) -> dict[str, Any]:
    """What a resumed run must have in common with the one it continues."""
    free = ("out", "resume", "device", "save_every", "log_every", "sample_every", "run", "subcommand")
    named = {name.replace("_", "-"): value for name, value in vars(arguments).items() if name not in free}
    return named | {"params": str(source.resolve()), "fingerprint of the data": fingerprint}


def _check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        differences = "; ".join(f"{name} was {before.get(name)}, now {now[name]}" for name in changed)
        raise ValueError(f"{out} was begun otherwise: {differences}. Resume with the same, or begin in another folder")


def _part(arguments: argparse.Namespace, model, pictures, encoded: Path):
    import torch

    from functional_sd3.core import prng
    from functional_sd3.training import parts

    settings = parts.Settings(
        steps=arguments.steps,
        batch=arguments.batch_size,
        rate=arguments.lr,
        warmup=arguments.warmup,
        ema=arguments.ema,
        accumulate=arguments.accumulate,
        dropout=arguments.dropout,
        scratch=arguments.scratch,
        lora=arguments.lora or 0,
        text_encoders=(arguments.text_encoders or ("train" if arguments.scratch else "frozen")) == "train",
        decoder_only=arguments.decoder_only,
        dtype=torch.bfloat16 if arguments.dtype == "bfloat16" else None,
        compile=arguments.compile,
    )
    key = prng.fold_in(prng.key(arguments.seed), 1)
    if arguments.part == "vae":
        return parts.vae_part(key, model, pictures, settings)
    return parts.flow_part(key, model, pictures, _encoded(arguments, model, pictures, encoded), settings)


def _encoded(arguments: argparse.Namespace, model, pictures, path: Path):
    """Latents and ids of all the pictures: computed once for a run, and read again when it is resumed."""
    from tqdm import tqdm

    from functional_sd3.text.conditioning import Ids
    from functional_sd3.training import datasets
    from functional_sd3.weights import files

    if arguments.resume and path.exists():
        mapped = files.open_mapped(path)
        ids = Ids(*(files.tensor(mapped, f"ids.{name}") for name in Ids._fields))
        return {"latents": files.tensor(mapped, "latents"), "ids": ids}
    t5 = model.tokenizers.t5
    data = datasets.encode_all(
        model.params,
        model.config,
        model.tokenizers,
        pictures.captions,
        pictures.load,
        t5_length=256 if t5 is None else min(256, t5.model_max_length),
        track=lambda rows: tqdm(rows, desc="encoding", leave=False, disable=None),
    )
    flat = {"latents": data["latents"]} | {f"ids.{name}": part for name, part in data["ids"]._asdict().items()}
    files.write_atomic(path, flat)
    return data


def _check_disk(out: Path, state, model) -> None:
    """A run that cannot save is better refused at once."""
    from functional_sd3.core import tree

    needed = (KEEP + 1) * tree.nbytes(state) + tree.nbytes(model.params)
    free = shutil.disk_usage(out).free + sum(file.stat().st_size for file in (out / "checkpoints").glob("step-*"))
    if free < needed:
        raise ValueError(
            f"{out} has {free / 2**30:.2f} GiB free; the checkpoints and the model need {needed / 2**30:.2f} GiB"
        )


def _save_picture(path: Path, images) -> None:
    import io

    from functional_sd3.image import pixels
    from functional_sd3.weights import files

    buffer = io.BytesIO()
    pixels.to_pil(pixels.grid(images.cpu(), columns=4))[0].save(buffer, format="PNG")
    files.write_atomic(path, buffer.getvalue())


def _save_model(out: Path, trained, stored) -> None:
    """The whole model: what was trained in the dtypes it was stored in, the rest as it was."""
    from functional_sd3 import weights
    from functional_sd3.core import tree

    before = {name: stored.params[name] for name in trained.params}
    params = tree.map(lambda leaf, old: leaf.to(old.device, old.dtype), trained.params, before)
    weights.save(out, stored._replace(config=trained.config, params={**stored.params, **params}))
