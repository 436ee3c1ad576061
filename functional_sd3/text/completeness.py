"""Check that a model has the text encoders and tokenizers that its prompts need, before they are encoded."""

from collections.abc import Collection
from typing import Any

from functional_sd3.formats.notes import note

_TITLES = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}
_FOLDERS = {"clip_l": "text_encoder/", "clip_g": "text_encoder_2/", "t5": "text_encoder_3/"}
_FILES = {"clip_l": "clip_l.safetensors", "clip_g": "clip_g.safetensors", "t5": "t5xxl_fp16.safetensors"}
_TOKENIZERS = {"clip_l": "tokenizer/", "clip_g": "tokenizer_2/", "t5": "tokenizer_3/"}
_RELEASE = "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium"
_HOW = "with --params, which may be repeated (in Python: weights.load([MODEL, ...]))"


def check_encoders(present: Collection[str], tokenizers: Any) -> None:
    """Raises ValueError where no text encoder is present or one lacks its tokenizer; a Note where some are absent.

    present: the names among "clip_l", "clip_g", "t5" whose parameters are present. tokenizers: tables by these names,
    or None.
    """
    absent = [name for name in _TITLES if name not in present]
    if len(absent) == len(_TITLES):
        raise ValueError(
            f"the model has no text encoder, so it cannot read prompts: SD3's are {_listed(_TITLES.values())}. "
            f"Download {_listed(_FILES.values())} (in text_encoders/ of {_RELEASE}) and the tokenizers, its folders "
            f"{_listed(_TOKENIZERS.values())}, and give each {_HOW}"
        )
    without_tokenizer = [name for name in present if getattr(tokenizers, name, None) is None]
    if without_tokenizer:
        raise ValueError(
            f"no tokenizer for {', '.join(without_tokenizer)}, whose parameters are given: download "
            f"{_listed(_TOKENIZERS[name] for name in without_tokenizer)} of {_RELEASE} and give the folder they are "
            f"in {_HOW}"
        )
    if absent:
        places = _listed(f"{_FOLDERS[name]} or {_FILES[name]}" for name in absent)
        note(
            f"the text encoder{'s' * (len(absent) > 1)} {_listed(_TITLES[name] for name in absent)} "
            f"{'are' if len(absent) > 1 else 'is'} missing or left out ({places}): zeros take the place of its output, "
            "and images follow the prompt less closely"
        )


def _listed(names) -> str:
    names = list(names)
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
