"""The unigram tokenizer of T5: text -> ids, as pure functions of immutable tables.

Kudo 2018, "Subword Regularization", section 3.2: of all segmentations of a text into pieces, take the most probable,

    argmax  sum_i log p(piece_i),

by Viterbi's algorithm; a character that is no piece costs ten more than the least probable piece. Two libraries do this
with the same files and do not always agree, so there is a `mode` for each:

- "hf": Hugging Face `tokenizers` with the `tokenizer.json` unchanged. Rewrites characters by grapheme cluster,
  segments word by word in float64, cuts typed special tokens out first.
- "transformers": the same file as `T5TokenizerFast` of transformers 5 loads it, which replaces the file's treatment of
  spaces. Differs from "hf" for white space that the character map does not rewrite, such as U+0085.
- "sentencepiece": the sentencepiece library with `spiece.model`. Rewrites by longest match, segments the whole text in
  float32, has no special tokens.
"""

from functional_sd3.text.unigram.encoding import Mode, apply, decode, normalize, offsets
from functional_sd3.text.unigram.files import init
from functional_sd3.text.unigram.tables import AddedToken, Spacing, Tables, build, from_pieces
from functional_sd3.text.unigram.training import plain_charsmap, train
from functional_sd3.text.unigram.writing import save

__all__ = [
    "AddedToken",
    "Mode",
    "Spacing",
    "Tables",
    "apply",
    "build",
    "decode",
    "from_pieces",
    "init",
    "normalize",
    "offsets",
    "plain_charsmap",
    "save",
    "train",
]
