"""CLIP's byte-pair tokenizer as pure functions: `init` reads the files into tables, `apply` turns texts into ids.

Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", over bytes, with `</w>` at the end
of a word (Radford et al. 2021, OpenAI CLIP). The ids are those of Hugging Face's `CLIPTokenizer` (transformers 5), bit
for bit; where other references disagree, `special_tokens`, `pad_token` and `clean` choose.
"""

from functional_sd3.text.bpe.clean import basic_clean, openai_clean
from functional_sd3.text.bpe.decoding import decode
from functional_sd3.text.bpe.encoding import apply, offsets
from functional_sd3.text.bpe.tables import Tables, init, save
from functional_sd3.text.bpe.training import train

__all__ = ["Tables", "apply", "basic_clean", "decode", "init", "offsets", "openai_clean", "save", "train"]
