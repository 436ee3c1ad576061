"""One HTML page of how an image came to be, with all images inside, and the same as files."""

import html
from collections.abc import Mapping

import torch

from functional_sd3.look import charts, sheets
from functional_sd3.look.charts import ENCODERS
from functional_sd3.look.markup import card_row, document, inline, section, table
from functional_sd3.look.plotting import Chart
from functional_sd3.look.record import Attention, Record
from functional_sd3.look.tokens import EncoderTokens, Prompt, Token

STREAMS = {"clip": "CLIP", "t5": "T5"}


def page(record: Record) -> str:
    """The page of a run: `<!doctype html> ...`, for a file, or for the `srcdoc` of a frame. Needs matplotlib.

    Raises `plotting.Missing` (an ImportError) where it is not installed.
    """
    figures = charts.of_record(record)
    parts = [
        _head(record),
        _tokens(record.prompt),
        _times(record, figures),
        _steps(record),
        _attention(record, figures),
        _norms(figures),
        _time(figures),
    ]
    return document(f"How this image came to be: {record.prompt.text}", "".join(parts))


def pngs(record: Record) -> dict[str, bytes]:
    """The images of the page as PNG by name: the image, the steps, the words, and every chart."""
    files = {"image": sheets.encode(sheets.to_pil(record.image))}
    files["steps"] = sheets.encode(sheets.frames_sheet(sheets.cells(record)))
    if record.attention is not None and (maps := sheets.word_maps(record.attention, record.prompt.words)):
        files["words"] = sheets.encode(sheets.words_sheet(record.image, maps))
    return files | {name: chart.png() for name, chart in charts.of_record(record).items()}


def _head(record: Record) -> str:
    prompt, negative = html.escape(record.prompt.text), html.escape(record.negative)
    facts = {name: str(value) for name, value in record.settings.items()}
    facts["in all"] = f"{sum(record.seconds.values()):.2f} s"
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in record.notes)
    against = f"<p>Negative prompt: <q>{negative}</q></p>" if negative else ""
    image = inline(sheets.to_pil(record.image), f"The image drawn for: {record.prompt.text}", "final")
    return (
        f"<header><h1>How this image came to be</h1><div class=lead>{image}<div><p class=prompt><q>{prompt}</q></p>"
        f"{against}{table(facts)}{notes}</div></div></header>"
    )


def _tokens(prompt: Prompt) -> str:
    intro = (
        "Each text encoder splits the prompt by a vocabulary of its own. The number below a token is its id: the row "
        "of the encoder's table of embeddings. <code>&lt;/w&gt;</code> ends a word of CLIP, <code>▁</code> begins one "
        "of T5. Every prompt is filled up with padding to one length; what is beyond it is cut."
    )
    if not prompt.encoders:
        return section("Tokens", intro, "<p class=note>This model has no text encoder.</p>")
    absent = [name for key, name in ENCODERS.items() if key not in {one.encoder for one in prompt.encoders}]
    missing = f"<p class=note>Absent from this model: {', '.join(absent)}; zeros stand in.</p>" if absent else ""
    return section("Tokens", intro, "".join(map(_encoder, prompt.encoders)) + missing)


def _encoder(one: EncoderTokens) -> str:
    read = [token for token in one.tokens if token.kind != "cut"]
    cut = [token for token in one.tokens if token.kind == "cut"]
    padding = sum(token.kind == "padding" for token in read)
    count = f"{len(read) - padding} tokens, {padding} of padding" + (
        f", <strong>{len(cut)} cut</strong>" if cut else ""
    )
    chips, run = [], 0
    for index, token in enumerate(one.tokens):
        run = run + 1 if token.kind == "padding" else 0
        following = one.tokens[index + 1] if index + 1 < len(one.tokens) else None
        if run and following is not None and (following.kind, following.id) == (token.kind, token.id):
            continue
        chips.append(_chip(token, run))
    return f"<h3>{ENCODERS[one.encoder]} <small>{count}</small></h3><ol class=tokens>{''.join(chips)}</ol>"


def _chip(token: Token, times: int) -> str:
    text = html.escape(token.text)
    many = f" × {times}" if times > 1 else ""
    title = {"cut": "cut: the encoder does not read it", "unknown": "not in the vocabulary"}.get(token.kind, token.kind)
    return f'<li class="{token.kind}" title="{title}"><b>{text}{many}</b><span>{token.id}</span></li>'


def _times(record: Record, figures: Mapping[str, Chart]) -> str:
    values = ", ".join(f"{t:.4g}" for t in record.times.tolist())
    intro = (
        "A run goes from noise at t = 1 to an image at t = 0: x_t = (1 - t) x_0 + t noise. The grid says at which "
        "t = σ its steps begin and end; a shift puts more of them at high noise, where the layout is decided."
    )
    values = f"<details><summary>All values</summary><p class=numbers>{values}</p></details>"
    return section("The grid of times", intro, card_row([figures["times"], figures["states"]]) + values)


def _steps(record: Record) -> str:
    shown = sheets.cells(record)
    count = len(record.denoised)
    intro = (
        "Above: the state x_t, decoded. Middle: the image that the step heads for, x_0 = x_t - t v. Below: the "
        "velocity v = noise - x_0, in the colours that latents have in this run (a linear decoder fitted to its "
        "frames; grey is 0): the image appears in its complementary colours, under the noise."
    )
    if len(shown.labels) < count:
        intro += f" {len(shown.labels)} of {count} steps are shown."
    # Large images show more in larger frames.
    style = "frames large" if max(shown.rows["x_t"].shape[-2:]) > 96 else "frames"
    frames = []
    for index, label in enumerate(shown.labels):
        images = "".join(
            inline(sheets.to_pil(part[index]), f"{name} at {label}", "pixels", "WEBP")
            for name, part in shown.rows.items()
        )
        frames.append(f"<li><b>{label}</b>{images}</li>")
    return section("Step by step", intro, f"<ol class='{style}'>{''.join(frames)}</ol>")


def _attention(record: Record, figures: Mapping[str, Chart]) -> str:
    attention, title = record.attention, "Attention of the image for each word"
    if attention is None:
        return ""
    maps = sheets.word_maps(attention, record.prompt.words)
    times = ", ".join(f"{float(record.times[step]):.2f}" for step in attention.steps)
    intro = (
        "In every block the tokens of the image and of the prompt attend to one another: softmax(q kᵀ / √d). A place "
        "of the image is lit by the share of its attention that goes to the word: the mean over heads, over all "
        f"blocks, and over the states at t = {times}. The percentage is that of the word's brightest place; the "
        "brightest of all words of an encoder is fully lit (the light is the square root of the share). Below, every "
        "map: what the places of the image receive from the word, and what the word receives from them, black 0 and "
        "white the largest of its table; grey where the prompt's tokens have no queries, in the last block."
    )
    if not maps:
        return section(title, intro, "<p class=note>No word of this prompt reaches the transformer.</p>")
    largest, shown = sheets.largest_of(maps), sheets.fit(record.image, sheets.SIDE)
    cards = []
    for group in _by_word(attention, maps).values():
        lit = []
        for each in group:
            name, most = STREAMS[each.stream], float(each.values.max())
            image = sheets.to_pil(sheets.spotlight(shown, each.values, largest[each.stream]))
            alt = f"Where the image attends to {each.word!r} of {name}: {_where(each.values)}"
            lit.append(
                f"<figure>{inline(image, alt, 'pixels', 'WEBP')}<figcaption>{name} {most:.1%}</figcaption></figure>"
            )
        cards.append(
            f"<li><b>{html.escape(group[0].word)}</b><div class=pair>{''.join(lit)}</div>{_details(record, group)}</li>"
        )
    body = f"<ol class=words>{''.join(cards)}</ol>" + card_row([figures["shares"]])
    return section(title, intro, body)


def _by_word(attention: Attention, maps: list[sheets.WordMap]) -> dict[int, list[sheets.WordMap]]:
    by_word: dict[int, list[sheets.WordMap]] = {}
    for each in maps:
        by_word.setdefault(attention.groups[each.group].word or 0, []).append(each)
    return by_word


def _details(record: Record, group: list[sheets.WordMap]) -> str:
    """The maps of one word by block (rows) and step (columns), both ways."""
    attention = record.attention
    assert attention is not None
    columns = "".join(f"<span>{float(record.times[step]):.2f}</span>" for step in attention.steps)
    rows = "".join(f"<span>{block}</span>" for block in attention.blocks)
    made = []
    for each in group:
        ways = {"image to word": attention.to_words, "word to image": attention.from_words}
        for way, every in ways.items():
            maps = every[:, :, each.group]
            most = float(maps.nan_to_num().max())
            name = f"{STREAMS[each.stream]}, {way}"
            alt = f"Attention {way} of {each.word!r} by {STREAMS[each.stream]}: rows are blocks, columns steps"
            sheet = inline(sheets.to_pil(sheets.by_block_and_step(maps)), alt, "pixels")
            made.append(
                f"<p>{name}, up to {most:.1%}</p><div class=sheet><i>block ↓ t →</i><div class=cols>{columns}</div>"
                f"<div class=rows>{rows}</div>{sheet}</div>"
            )
    return f"<details><summary>by block and step</summary>{''.join(made)}</details>"


def _where(values: torch.Tensor) -> str:
    """The part of the image where a map is largest, in words."""
    height, width = values.shape
    row, column = divmod(int(values.flatten().argmax()), width)
    vertical = ("top", "middle", "bottom")[min(2, 3 * row // height)]
    return f"most in the {vertical} {('left', 'centre', 'right')[min(2, 3 * column // width)]}"


def _norms(figures: Mapping[str, Chart]) -> str:
    intro = (
        "Root mean squares over all elements of the velocities. Guidance moves the prompt's velocity away from that of "
        "the negative prompt; classifier-free: v = v_negative + scale (v_prompt - v_negative). Where what it adds is "
        "large, it decides; where it is small, it could be left out."
    )
    charts = [figures[name] for name in ("norms", "guidance") if name in figures]
    return section("Norms of the velocities and of guidance", intro, card_row(charts)) if charts else ""


def _time(figures: Mapping[str, Chart]) -> str:
    intro = (
        "Seconds that passed in each part, of an encoder with reading it. Attention maps and the decoding of the steps "
        "are for this page alone."
    )
    return section("Time", intro, card_row([figures["seconds"], figures["step-seconds"]]))
