"""One HTML page of the logs of training: a chart for every column, the last values, several logs compared."""

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path

from functional_sd3.look import logs
from functional_sd3.look.logs import Log
from functional_sd3.look.markup import card_row, document, rows_table, section
from functional_sd3.look.save import INDEX, write


def log_page(read: Sequence[Log]) -> str:
    """The page of some logs. Needs matplotlib, as `look.page` does."""
    title = "Training: " + ", ".join(log.name for log in read)
    intro = (
        "A chart for each column of the log, over the steps. <b>loss</b>: what is minimised, of a flow the mean "
        "of (v(x_t, t) - (noise - x_0))², by t where the log has it; near t = 0 and t = 1 that stays high however good "
        "the model is. A line of many points is pale, with its running mean over it."
    )
    notes = [
        f"<p class=note>{html.escape(log.name)}: not plotted, as it holds no numbers: "
        f"{html.escape(', '.join(log.left_out))}</p>"
        for log in read
        if log.left_out
    ]
    notes += [
        f"<p class=note>{html.escape(log.name)}: not plotted: {html.escape(note)}</p>"
        for log in read
        for note in log.notes
    ]
    names = list(dict.fromkeys(name for log in read for name in log.columns))
    cells = [[name, *(_last(log, name) for log in read)] for name in names]
    table = rows_table(["last value", *(log.name for log in read)], cells)
    body = section("Charts", intro, "".join(notes) + card_row(logs.charts(read).values()))
    return document(title, f"<h1>{html.escape(title)}</h1>{body}" + section("The last row", "", table))


def save_logs(folder: str | os.PathLike[str], read: Sequence[Log]) -> list[Path]:
    """Write FOLDER/index.html, which needs no other file, and each chart as a PNG; returns their paths.

    As `look.save` does.
    """
    contents = {INDEX: log_page(read).encode()}
    for name, chart in logs.charts(read).items():
        contents[f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('.') or 'column'}.png"] = chart.png()
    return write(folder, contents)


def _last(log: Log, name: str) -> str:
    value = logs.last(log.columns.get(name, ()))
    return "" if value != value else f"{value:.6g}"
