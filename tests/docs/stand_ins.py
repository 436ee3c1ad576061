"""Small random stand-ins for the files that the pages' commands and programs need, written by this project."""

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import gguf
import numpy
import torch
from safetensors.torch import load_file, save_file

from functional_sd3 import lora, weights
from functional_sd3.core import prng, tree
from functional_sd3.formats import files
from functional_sd3.image import pixels, taesd
from functional_sd3.layouts import rules
from functional_sd3.layouts.clip_dual import LAYOUT
from functional_sd3.recipes import shapes
from functional_sd3.text import bpe, clip, textual_inversion
from functional_sd3.text.clip import dual as clip_dual
from functional_sd3.transformer import controlnet, ip_adapter
from functional_sd3.weights import controlnets, ip_adapters, shipped
from tests import models
from tests.docs.markdown import ROOT

RELEASED = ("stable-diffusion-3.5-medium", "stable-diffusion-3.5-large", "stable-diffusion-3.5-large-turbo")
MODELS = ("MODEL", "A", "B", *RELEASED, *(f"params/{name}" for name in RELEASED))
IMAGES = ("my_images", "real", "fake", "FOLDER", "out/gallery/purple")
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


def make(top: Path) -> None:
    """Fills the folder `top` as the reader's folder would be: a checkout's params/tiny and docs, and downloads."""
    shutil.copytree(shipped.folder(), top / "params" / "tiny")
    shutil.copytree(ROOT / "docs", top / "docs")
    for place, name in enumerate(IMAGES):
        images(top / name, 4, place)
    shutil.copytree(top / "my_images", top / "masks")
    (top / "log.csv").write_text("step,seconds,loss,bin_0,bin_1\n1,0.5,2,1,3\n2,1,1,0.5,1.5\n")
    for name in ("edges.png", "mask.png"):  # docs/gallery.md makes them by programs.
        shutil.copy(ROOT / "docs" / "gallery" / name, top / "out" / "gallery")
    for name in ("edges.png", "depth.png", "image.png", "MASK.png"):
        shutil.copy(top / "real" / "0.png", top / name)
    model = models.random_model()
    for name in MODELS:
        weights.save(top / name, model)
    changed = tree.map(lambda leaf: 1.01 * leaf, model.params["transformer"])
    weights.save(top / "TUNED", model._replace(params=model.params | {"transformer": changed}))
    single_files(top, model)
    extras(top, model)
    metrics(top)
    tars(top)


def images(folder: Path, count: int, seed: int) -> None:
    """Images of the shapes world, each with its caption beside it."""
    folder.mkdir(parents=True)
    drawn, captions = shapes.images(prng.key(seed), count)
    for index, (image, caption) in enumerate(zip(pixels.to_pil(pixels.from_bytes(drawn)), captions, strict=True)):
        image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption, encoding="utf-8")


def tars(top: Path) -> None:
    """Two tars of the images of a folder, in webdataset's layout."""
    (top / "shards").mkdir()
    for number in range(2):
        with tarfile.open(top / "shards" / f"{number:04d}.tar", "w") as archive:
            for path in sorted((top / IMAGES[0]).iterdir())[4 * number : 4 * number + 4]:
                archive.add(path, path.name)


def single_files(top: Path, model: weights.Model) -> None:
    """The model in the other forms that people have: Stability's files, tokenizers, folders of one component, TAESD."""
    weights.save(top / "models", model, layout="stability")
    for name in ("clip_l", "clip_g", "t5xxl"):
        shutil.copy(top / "models" / f"{name}.safetensors", top)
    shutil.copy(top / "models" / "sd3.safetensors", top / "sd3.5_medium.safetensors")
    weights.save(top / "all.safetensors", model, layout="single")
    weights.save(top / "ours.safetensors", model, layout="native")
    for component in ("transformer", "vae", "text_encoder"):
        shutil.copytree(top / "MODEL" / component, top / component)
    one_byte(top)
    tokenizers = top / "tokenizers"
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(top / "MODEL" / name, tokenizers / name)


def one_byte(top: Path) -> None:
    """The T5 in float8, in ComfyUI's scaled float8, and as GGUF."""
    tensors = load_file(top / "t5xxl.safetensors")
    is_layer = {name: value.ndim == 2 and ".layer." in name for name, value in tensors.items()}
    small = {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}
    save_file(small, top / "t5xxl_fp8_e4m3fn.safetensors")
    layers = [name.removesuffix("weight") for name, layer in is_layer.items() if layer]
    scaled = {name: small[name] if layer else tensors[name] for name, layer in is_layer.items()}
    scales = {f"{name}scale_weight": torch.tensor(0.5) for name in layers}
    save_file(scaled | scales, top / "t5xxl_scaled_fp8.safetensors")
    writer = gguf.GGUFWriter(top / "t5xxl.gguf", "t5")
    for name, value in tensors.items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def extras(top: Path, model: weights.Model) -> None:
    """A ControlNet of Stability's and one in diffusers' folder, an IP-Adapter, words, a LoRA, a small autoencoder."""
    transformer = model.config.transformer
    sizes = {name: getattr(transformer, name) for name in ("heads", "head_dim", "pooled_width")}
    alone = controlnet.Config(
        2, **sizes, context_width=None, has_patch_embedding=False, position_size=None, zero_pooled=False
    )
    net = controlnets.ControlNet(controlnet.init(prng.key(1), alone), alone)
    weights.save_controlnet(top / "depth", net)
    canny = net._replace(config=dataclasses.replace(alone, kind="canny"))
    for name in ("canny.safetensors", "sd3.5_large_controlnet_canny.safetensors"):
        weights.save_controlnet(top / name, canny, layout="stability")

    attentions = transformer.depth + len(transformer.dual_attention_layers)
    small = ip_adapter.Config(
        attentions,
        transformer.width,
        transformer.head_dim,
        hidden_width=32,
        depth=1,
        heads=2,
        resampler_head_dim=16,
        tokens=4,
        mlp_width=32,
    )
    adapter = ip_adapters.IPAdapter(ip_adapter.init(prng.key(2), small), small)
    weights.save_ip_adapter(top / "ip-adapter.safetensors", adapter)

    for name in ("cat-toy", "dog"):
        widths = {encoder: getattr(model.config, encoder).width for encoder in textual_inversion.ENCODERS}
        vectors = {encoder: prng.normal(prng.key(3), (2, width)) for encoder, width in widths.items()}
        weights.save_inversion(top / f"{name}.safetensors", textual_inversion.Word(f"<{name}>", vectors))
    for seed, name in enumerate(("style", "face")):
        lora.save(top / f"{name}.safetensors", lora.init(prng.key(seed), model.config, 4))
    autoencoder(top, model)


def autoencoder(top: Path, model: weights.Model) -> None:
    """TAESD3 in one file, and as its author's two."""
    config = taesd.Config(width=8, encoder_blocks=(1, 1, 1, 1), decoder_blocks=(1, 1, 1, 1))
    alone = weights.Config(taesd=config, schedule=model.config.schedule)
    small = weights.Model({"taesd": taesd.init(prng.key(4), config)}, alone)
    weights.save(top / "taesd3.safetensors", small, layout="single")
    tensors = load_file(top / "taesd3.safetensors")
    for half in ("encoder", "decoder"):
        prefix = f"taesd_{half}."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        torch.save(own, top / f"taesd3_{half}.pth")


def metrics(top: Path) -> None:
    """Inception and CLIP with random weights, and statistics as pytorch-fid writes them."""
    torch.save(tree.flatten_paths(models.random_inception()), top / INCEPTION)
    numpy.savez(top / "cifar.npz", mu=numpy.zeros(64), sigma=numpy.eye(64))
    tables = models.tokenizers().clip_l
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
    config = clip_dual.Config(
        clip.Config(len(tables.vocab), 24, 32, 2, 2, 48, projection_width=16, eos_id=tables.eos_id),
        clip.ImageConfig(16, 8, 32, 2, 2, 48, projection_width=16),
    )
    folder = top / "clip-vit-base-patch32"
    folder.mkdir()
    leaves = tree.flatten_paths(clip_dual.init(prng.key(5), config))
    files.write(folder / "model.safetensors", rules.to_theirs(LAYOUT, clip_dual.spec(config), leaves))
    text = tower | {"vocab_size": len(tables.vocab), "max_position_embeddings": 24, "eos_token_id": tables.eos_id}
    said = {"text_config": text, "vision_config": tower | {"image_size": 16, "patch_size": 8}}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": 16, **said}))
    bpe.save(folder, tables)
