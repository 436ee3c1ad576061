"""Tables of the folder that diffusers writes for SD3: where each component and each tokenizer lies."""

from typing import Any, NamedTuple

from functional_sd3.layouts import registry
from functional_sd3.layouts.format import Format
from functional_sd3.layouts.rules import Layout
from functional_sd3.text import bpe, unigram

INDEX = "model_index.json"


class Component(NamedTuple):
    """Subfolder, class and format of a component; `stem` starts the names of its weight files."""

    folder: str
    library: str
    owner: str
    format: Format
    stem: str
    optional: bool

    @property
    def layout(self) -> Layout:
        """The rules, which in diffusers' and transformers' names are the same for all sizes."""
        return self.format.names


class Tokenizer(NamedTuple):
    """Subfolder and classes of a tokenizer, and the module that reads it."""

    folder: str
    owners: tuple[str, ...]
    module: Any


_FORMATS = registry.DIFFUSERS
_CLIP = ("transformers", "CLIPTextModelWithProjection", _FORMATS["clip_l"], "model", True)
_STEM = "diffusion_pytorch_model"
COMPONENTS = {
    "clip_l": Component("text_encoder", *_CLIP),
    "clip_g": Component("text_encoder_2", *_CLIP),
    "t5": Component("text_encoder_3", "transformers", "T5EncoderModel", _FORMATS["t5"], "model", True),
    "transformer": Component(
        "transformer", "diffusers", "SD3Transformer2DModel", _FORMATS["transformer"], _STEM, False
    ),
    "vae": Component("vae", "diffusers", "AutoencoderKL", _FORMATS["vae"], _STEM, False),
}
TAESD = Component("taesd", "diffusers", "AutoencoderTiny", _FORMATS["taesd"], _STEM, True)
"""Component in a folder that the index does not name, or in `vae/` where the index gives this as its class."""
_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_T5_TOKENIZERS = ("T5TokenizerFast", "T5Tokenizer")
TOKENIZERS = {
    "clip_l": Tokenizer("tokenizer", _CLIP_TOKENIZERS, bpe),
    "clip_g": Tokenizer("tokenizer_2", _CLIP_TOKENIZERS, bpe),
    "t5": Tokenizer("tokenizer_3", _T5_TOKENIZERS, unigram),
}
SCHEDULER = ("scheduler", "FlowMatchEulerDiscreteScheduler")
_COMPONENT_FOLDERS = tuple(component.folder for component in (*COMPONENTS.values(), TAESD))
OWNED = (INDEX, SCHEDULER[0], *_COMPONENT_FOLDERS, *(tokenizer.folder for tokenizer in TOKENIZERS.values()))
"""The entries of a folder that belong to the model."""
