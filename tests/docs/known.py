"""How the commands of the pages are run here: the inputs their placeholders stand for, and numbers that cost little."""

import re
import shlex

PROMPT = "a large red circle on a white background"

PLACEHOLDERS = {
    "*": {
        "MODEL": "MODEL",
        "PATH": "MODEL",
        "METRIC": "prompts",
        "REAL": "real",
        "FAKE": "fake",
        "FOLDER": "FOLDER",
        "PROMPT": PROMPT,
        "IMAGE": "a.png",
        "IN": "image.png",
        "MASK": "MASK.png",
    },
    "--inception": {"FILE": "pt_inception-2015-12-05-6726825d.pth"},
    "--clip": {"DIR": "clip-vit-base-patch32"},
    "--json": {"FILE": "result.json"},
    "--params": {"DIR": "MODEL"},
    "--data": {"DIR": "my_images"},
    "--out": {"PATH": "out/result", "DIR": "out/result", "FILE": "out/result.png"},
    "--controlnet": {"A": "canny.safetensors", "B": "depth"},
    "--variation": {"SEED:AMOUNT": "3:0.5"},
    "--log": {"FILE": "log.csv", "OTHER": "log.csv"},
    "--lora": {"OTHER": "style.safetensors"},
    "--soften": {"PX": "2"},
    "--sampling-steps": {"N": "2"},
    "--overlap": {"PX": "16"},
}
"""Option ("*": any place) -> what a word of the pages stands for after it."""

CAPS = {
    "--steps": 2,
    "--sampling-steps": 3,
    "--count": 2,
    "--frames": 2,
    "--probes": 1,
    "--draws": 1,
    "--rank": 2,
    "--batch-size": 2,
    "--prior-images": 2,
    "--validation": 2,
    "--pictures": 8,
    "--warmup": 1,
}
"""Option -> the largest number it is run with."""

ADDED = {
    "generate": ["--steps", "2"],
    "edit": ["--steps", "2"],
    "interpolate": ["--steps", "2"],
    "likelihood": ["--steps", "1"],
    "quantize": ["--steps", "1"],
    "distill": ["--steps", "2", "--batch-size", "2", "--warmup", "1", "--sample-every", "0", "--pictures", "8"],
    "cache": ["--pictures", "8"],
    "train": ["--steps", "2", "--batch-size", "2", "--warmup", "1", "--sample-every", "0", "--pictures", "8"],
    "reward": [
        "--steps",
        "1",
        "--batch-size",
        "4",
        "--group",
        "2",
        "--sampling-steps",
        "2",
        "--draws",
        "1",
        "--sample-every",
        "0",
    ],
    "evaluate prompts": ["--steps", "2", "--count", "1", "--things", "1"],
    "evaluate fid": ["--features", "64"],
    "evaluate kid": ["--features", "64"],
    "lora extract": ["--rank", "2"],
}
"""Subcommand -> the options it is given besides, where the page has not given them."""

_TWO = "'a large red circle left of a small blue star on a white background'"
_FEW = "--steps 2 --attention-steps 1 --image-steps 1"
_COMPONENTS = ("t5xxl.safetensors", "t5xxl_fp8_e4m3fn.safetensors", "t5xxl_scaled_fp8.safetensors")
USAGES = {
    "functional-sd3 evaluate METRIC": [],  # A row for each metric stands below it.
    "functional-sd3 convert IN... OUT --layout diffusers|stability|single|native": [
        "convert MODEL out/diffusers --layout diffusers",
        "convert sd3.5_medium.safetensors clip_l.safetensors clip_g.safetensors out/stability --layout stability",
        "convert MODEL out/single.safetensors --layout single",
        "convert MODEL out/native --layout native",
    ],
    "functional-sd3 convert IN OUT.safetensors --layout single": [
        "convert MODEL out/single.safetensors --layout single",
        "convert taesd3.safetensors out/taesd.safetensors --layout single",
    ],
    "functional-sd3 convert IN tokenizers/ OUT --layout diffusers": [
        "convert sd3.5_medium.safetensors tokenizers/ out/a --layout diffusers",
        "convert all.safetensors tokenizers/ out/b --layout diffusers",
    ],
    "functional-sd3 convert transformer/ vae/ text_encoder/ OUT --layout diffusers": [
        "convert transformer/ vae/ text_encoder/ out/c --layout diffusers"
    ],
    "functional-sd3 convert clip_l clip_g OUT --layout stability": [
        "convert clip_l.safetensors clip_g.safetensors out/d --layout stability"
    ],
    "functional-sd3 convert IN OUT --layout stability --dtype bfloat16": [
        f"convert {name} out/{name.removesuffix('.safetensors')} --layout stability --dtype bfloat16"
        for name in _COMPONENTS
    ],
    "functional-sd3 convert IN.gguf OUT --layout stability --dtype bfloat16": [
        "convert t5xxl.gguf out/e --layout stability --dtype bfloat16"
    ],
    "functional-sd3 convert IN OUT.safetensors --layout stability": [
        "convert transformer out/transformer.safetensors --layout stability",
        "convert vae out/vae.safetensors --layout stability",
    ],
    "functional-sd3 convert ENCODER DECODER OUT --layout diffusers": [
        "convert taesd3_encoder.pth taesd3_decoder.pth out/f --layout diffusers"
    ],
    "functional-sd3 convert IN OUT --layout diffusers": ["convert ours.safetensors out/g --layout diffusers"],
    "functional-sd3 convert models/ OUT --layout diffusers": ["convert models/ out/h --layout diffusers"],
    # The whole pages take seconds; an option of an image is refused beside --log, so they are not those of every look.
    f"functional-sd3 look {_TWO} --seed 3 --out look/": [f"look {_TWO} --seed 3 --out look/ {_FEW}"],
    f"functional-sd3 look '{PROMPT}' --out out/look/": [f"look '{PROMPT}' --out out/look/ {_FEW} --params MODEL"],
    # It would be served until Ctrl-C; tests/cli/test_app.py does.
    "functional-sd3 app": ["app --help"],
    "functional-sd3 app --params MODEL --lora style.safetensors --max-count 8 --port 8000": [
        "app --params MODEL --lora style.safetensors --max-count 8 --port 8000 --help"
    ],
    "functional-sd3 generate --params A --params B": [
        f"generate '{PROMPT}' --params sd3.5_medium.safetensors --params clip_l.safetensors --params tokenizers"
    ],
    "functional-sd3 generate PROMPT --image IN --outpaint right=64,left=32 [--overlap PX]": [
        f"generate '{PROMPT}' --image image.png --outpaint right=64,left=32 --overlap 16 --params MODEL"
    ],
    "functional-sd3 edit IN --from PROMPT --to PROMPT [--eta 0.9] [--window 0-0.25] [--exact]": [
        f"edit image.png --from '{PROMPT}' --to '{PROMPT}' --eta 0.9 --window 0-0.25",
        f"edit image.png --from '{PROMPT}' --to '{PROMPT}' --exact --params MODEL",
    ],
    f"functional-sd3 edit out/gallery/two.png --exact --eta 0 --cfg 1 --from {_TWO} --to {_TWO} "
    "--out out/gallery/inversion.png": [  # Two steps of the shipped model are too long to be solved.
        f"edit image.png --exact --eta 0 --cfg 1 --from '{PROMPT}' --to '{PROMPT}' --params MODEL",
    ],
    "functional-sd3 generate PROMPT --preview [EVERY]": [
        f"generate '{PROMPT}' --preview",
        f"generate '{PROMPT}' --preview 2",
    ],
    "functional-sd3 generate PROMPT --compile": [f"generate '{PROMPT}'"],  # Compiling takes a minute.
    "functional-sd3 generate PROMPT --size 2048x1024 --tile 1024[:OVERLAP]": [
        f"generate '{PROMPT}' --size 128x64 --tile {tile}" for tile in ("64", "64:32")
    ],
}
"""A usage of the pages that placeholders do not cover -> the command lines that are run in its place."""

MAKE = {
    "demo": lambda lines: [bounded(shlex.split(line)[1:]) for line in lines],
    "test": lambda lines: [],
    "bench": lambda lines: [],
    "docs": lambda lines: [],
    "tiny": lambda lines: [["python", *shlex.split(line)[1:3], "--help"] for line in lines],
    "notebooks": lambda lines: [
        ["python", *shlex.split(line)[1:], "--out", "notebooks"] for line in lines if " pip " not in line
    ],
}
"""Target of make -> what is run of its recipe."""

_SHORT = ("--steps", "1", "--batch-size", "2", "--warmup", "0", "--sample-every", "0")
OTHERS = {
    "pip install .": [],
    'pip install -e ".[bench]"': [],
    "pip install 'functional_sd3[app]'": [],
    'pip install "functional_sd3[look]"': [],
    "python -m bench.products --narrow": [["python", "-m", "bench.products", "--help"]],
    "python -m bench.cards": [["python", "-m", "bench.cards", "--help"]],
    "python -m bench.generation_memory FOLDER": [["python", "-m", "bench.generation_memory", "--help"]],
    "python -m bench.offload_peers FOLDER": [["python", "-m", "bench.offload_peers", "--help"]],
    "python -m bench mesh --cpu-time": [["python", "-m", "bench", "mesh", "--list"]],
    "python -m bench.likelihood": [
        ["python", "-m", "bench.likelihood", "--count", "1", "--steps", "1", "--draws", "1"],
    ],
    "python -m bench.objectives control --pictures 1024 --steps 400 --batch-size 16 --lr 1e-3 --schedule constant "
    "--ema 0.98 --warmup 20": [
        ["python", "-m", "bench.objectives", "control", "--count", "1", *_SHORT, "--pictures", "4"],
    ],
    "python -m bench.objectives word --steps 150 --batch-size 16 --lr 5e-3 --schedule constant "
    "--ema 0.95 --warmup 10": [
        ["python", "-m", "bench.objectives", "word", "--count", "1", *_SHORT],
    ],
    **{
        f"python -m bench.study {options}": [["python", "-m", "bench.study", "--help"]]
        for options in ("--out out/study", "--out out/study --run NFT --seeds 1 --minutes 10", "--memory", "--draw")
    },
    **{
        f"python -m bench {options}": [["python", "-m", "bench", "--list"]]
        for options in ("--list", "attention fewsteps", "attention fewsteps --cpu-time", "-k clip")
    },
    "python docs/learn/run.py": [["python", "docs/learn/run.py", "--help"]],
    "python docs/learn/run.py 10 --whole": [["python", "docs/learn/run.py", "--help"]],
    "python docs/gallery.py": [["python", "docs/gallery.py", "--help"]],
    "python -m bench.mesh_drill": [["python", "-m", "bench.mesh_drill", "--help"]],
    "python -m bench.evaluations": [["python", "-m", "bench.evaluations", "--help"]],
    "python -m bench.caching": [["python", "-m", "bench.caching", "--help"]],
    "python -m bench.gpu": [["python", "-m", "bench.gpu", "--help"]],
    "python -m bench.training_memory": [["python", "-m", "bench.training_memory", "--help"]],
    "python bench/compare.py OLD.json NEW.json": [["python", "bench/compare.py", "--help"]],
}
"""Command lines of other programs -> what is run in their place; those that take minutes only say how they are used."""


def runs(text: str) -> list[list[str]]:
    """The arguments of the commands that are run for one of a page, without the program's name."""
    if text in USAGES:
        return [bounded(shlex.split(each)) for each in USAGES[text]]
    words = shlex.split(re.sub(r"[\[\]]", "", text))[1:]
    return [bounded(substituted(words))]


def substituted(words: list[str]) -> list[str]:
    """The words with those in capitals replaced by what they stand for."""
    replaced, option = [], "*"
    for word in words:
        option = word if word.startswith("--") else option
        table = PLACEHOLDERS["*"] | PLACEHOLDERS.get(option, {})
        name, equals, value = word.partition("=")
        replaced.append(
            f"{table.get(name, name)}{equals}{table.get(value, value)}" if equals else table.get(word, word)
        )
    return replaced


def bounded(words: list[str]) -> list[str]:
    """The words with numbers cut to `CAPS`, and with what `ADDED` says."""
    extended = list(words)
    for index, word in enumerate(words[:-1]):
        if word in CAPS:
            extended[index + 1] = str(min(int(words[index + 1]), CAPS[word]))
        if word in ("--rtol", "--atol"):
            extended[index + 1] = "0.5"
    added = ADDED.get(words[0]) or ADDED.get(" ".join(words[:2]), [])
    for option, value in zip(added[::2], added[1::2], strict=True):
        if option not in words:
            extended += [option, value]
    return extended
