"""Charts of a run: the grid of times, norms of the velocities, shares of attention, seconds."""

from typing import Any

import torch

from functional_sd3.look.plotting import COLOURS, Chart
from functional_sd3.look.record import Record

ENCODERS = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}


def time_grid(record: Record) -> Chart:
    """t = sigma after each number of steps."""
    times = record.times.tolist()

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.plot(range(len(times)), times, "o-", color=COLOURS[0])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.plot([0, len(times) - 1], [times[0], times[-1]], ":", color=COLOURS[-1], label="even steps")
        axes.set(xlabel="steps taken", ylabel="t (1: noise, 0: image)")
        axes.legend()

    return Chart(
        draw, f"The grid of times: t after each of {len(times) - 1} steps, from {times[0]:g} to {times[-1]:g}."
    )


def norms(record: Record) -> Chart:
    """Root mean squares of the velocities at every evaluation, over t."""
    seen = record.evaluations
    ts = [float(each.t) for each in seen]
    names = list(dict.fromkeys(name for each in seen for name in each.norms))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for index, name in enumerate(names):
            points = [(t, float(each.norms[name])) for t, each in zip(ts, seen, strict=True) if name in each.norms]
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[index % 3], label=_branch(name))
        axes.plot(ts, [float(each.guided) for each in seen], "o-", color=COLOURS[3], label="guided")
        _over_t(axes, "root mean square")

    return Chart(draw, f"Norms of the velocities over t: {', '.join(map(_branch, names))} and guided.")


def guidance(record: Record) -> Chart:
    """Root mean square over t of the change that guidance makes to the prompt's velocity."""
    ts, added = [float(each.t) for each in record.evaluations], [float(each.change) for each in record.evaluations]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.plot(ts, added, "o-", color=COLOURS[1], label="guided - prompt")
        _over_t(axes, "root mean square")
        axes.set_ylim(bottom=0)

    largest = max(zip(added, ts, strict=True))
    return Chart(draw, f"What guidance adds to the velocity, over t: most, {largest[0]:.3g}, at t = {largest[1]:.2f}.")


def state_norms(record: Record) -> Chart:
    """Root mean squares of x_t and of the predicted x_0."""
    times = record.times.tolist()
    states, predicted = (part.flatten(1).square().mean(1).sqrt().tolist() for part in (record.states, record.denoised))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.plot(times, states, "o-", color=COLOURS[0], label="x_t")
        axes.plot(times[:-1], predicted, "o-", color=COLOURS[1], label="predicted x_0")
        _over_t(axes, "root mean square")

    return Chart(draw, "Norms of the state x_t and of the predicted x_0 over t.")


def shares(record: Record) -> Chart:
    """Shares of an image token's attention: to the image, the words and the other tokens of the prompt, by block."""
    attention = record.attention
    assert attention is not None
    parts = {"image": attention.image.mean((0, 2, 3))}
    names = {("clip", True): "CLIP: words", ("clip", False): "CLIP: start, end, padding"}
    names |= {("t5", True): "T5: words", ("t5", False): "T5: end, padding"}
    for (stream, is_word), name in names.items():
        of = [
            i for i, group in enumerate(attention.groups) if (group.stream, group.word is not None) == (stream, is_word)
        ]
        if of:
            parts[name] = attention.to_words[:, :, of].sum(2).mean((0, 2, 3))

    def draw(figure: Any) -> None:
        axes, base = figure.add_subplot(), torch.zeros_like(parts["image"])
        colours = (COLOURS[-1], COLOURS[0], COLOURS[5], COLOURS[1], COLOURS[4])
        for (name, values), colour in zip(parts.items(), colours, strict=False):
            axes.bar(list(map(str, attention.blocks)), values.tolist(), bottom=base.tolist(), color=colour, label=name)
            base = base + values
        axes.set(xlabel="block", ylabel="share of the attention")
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside lower center", ncols=2)

    words = "; ".join(f"{name} {float(values.mean()):.0%}" for name, values in parts.items())
    return Chart(draw, f"Of the attention of an image token goes, mean of all blocks: {words}.", (4.2, 3.4))


def seconds(record: Record) -> Chart:
    """Wall time of each part."""
    names = ENCODERS | {"transformer": "reading the transformer", "vae": "reading the VAE"}
    parts = {names.get(name, name): value for name, value in record.seconds.items() if value >= 5e-4}

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        bars = axes.barh(list(parts), list(parts.values()), color=COLOURS[0])
        axes.bar_label(bars, [f" {value:.2f} s" for value in parts.values()], fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="seconds")

    words = ", ".join(f"{name} {value:.2f} s" for name, value in parts.items())
    return Chart(draw, f"Time of each part: {words}.", (4.2, 0.9 + 0.22 * len(parts)))


def step_seconds(record: Record) -> Chart:
    """Wall time of each step."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        milliseconds = [1000 * value for value in record.step_seconds]
        axes.bar(range(1, len(milliseconds) + 1), milliseconds, color=COLOURS[0])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="step", ylabel="milliseconds")

    return Chart(draw, f"Time of each of {len(record.step_seconds)} steps, {sum(record.step_seconds):.2f} s together.")


def of_record(record: Record) -> dict[str, Chart]:
    """The charts of a run by name, without those that it has nothing for."""
    charts: dict[str, Chart] = {"times": time_grid(record), "states": state_norms(record)}
    if record.evaluations:
        charts["norms"] = norms(record)
    if any(float(each.change) for each in record.evaluations):
        charts["guidance"] = guidance(record)
    if record.attention is not None:
        charts["shares"] = shares(record)
    return charts | {"seconds": seconds(record), "step-seconds": step_seconds(record)}


def _over_t(axes: Any, upwards: str) -> None:
    axes.set(xlabel="t (noise on the left, image on the right)", ylabel=upwards)
    axes.set_xlim(1.03, -0.03)
    axes.legend()


def _branch(name: str) -> str:
    return {"positive": "prompt", "negative": "negative prompt"}.get(name, name)
