"""Record and page of a run: `trace` keeps its tokens, steps, attention and times; `page` and `save` show them.

    record = sd3.look.trace(params, config, tokenizers, "a large red circle", sd3.prng.key(0))
    sd3.look.save("look/", record)        # look/index.html and PNGs; as the last line of a notebook's cell: the page

`save_logs("look/", [read_log("params/mine")])` plots logs of training. `trace` computes and returns tensors; drawing
needs matplotlib, `pip install "functional_sd3[look]"`.
"""

from functional_sd3.look.log_page import log_page, save_logs
from functional_sd3.look.logs import Log
from functional_sd3.look.logs import read as read_log
from functional_sd3.look.maps import WordMaps, word_maps
from functional_sd3.look.markup import frame
from functional_sd3.look.plotting import Missing
from functional_sd3.look.record import Attention, Evaluation, Frames, Group, Record
from functional_sd3.look.run_page import page, pngs
from functional_sd3.look.save import save
from functional_sd3.look.tokens import EncoderTokens, Prompt, Token
from functional_sd3.look.trace import Trace, trace, trace_request

__all__ = [
    "Attention",
    "EncoderTokens",
    "Evaluation",
    "Frames",
    "Group",
    "Log",
    "Missing",
    "Prompt",
    "Record",
    "Token",
    "Trace",
    "WordMaps",
    "frame",
    "log_page",
    "page",
    "pngs",
    "read_log",
    "save",
    "save_logs",
    "trace",
    "trace_request",
    "word_maps",
]
