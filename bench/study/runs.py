"""The runs of the study: each a command of `functional-sd3`, a seed and a budget of CPU time."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from functional_sd3.cli import distill_options

REWARDED, DISTILLED = "rewarded", "distilled"
SEEDS = (0, 1, 2)
REWARD_STEPS = 8
"""Steps of the sampler that rewards train and measure, without guidance."""
STUDENT_STEPS = (4, 2, 1)

METHODS = {
    "NFT": "--method nft",
    "AWM": "--method awm",
    "Flow-GRPO": "--method grpo --form flow",
    "CPS": "--method grpo --form cps",
    "Guard": "--method grpo --form guard",
    "DPO": "--method dpo",
}
"""Methods of rewards by their name, and the options that choose them."""
STUDENTS = {"segments": "segments", "MeanFlow": "meanflow", "sCM": "scm"}
"""Ways into few steps by their name, and what `distill --method` calls them."""
PROXIES = ("NFT", "Flow-GRPO", "Guard", "AWM")
"""Those that the proxy reward is tried with."""


class Run(NamedTuple):
    """A run of the study.

    name: unique but for the seed. kind: which of the tables it is in. words: the command, without model, seed and
    folder. minutes: CPU minutes of training. steps: those its images are drawn in, without guidance, at every mark.
    start: name of the run whose model it starts from; None for the start of all.
    """

    name: str
    kind: str
    words: str
    minutes: float
    steps: Sequence[int]
    seed: int = 0
    start: str | None = None

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.name.lower().replace(' ', '-')}-{self.seed}"

    @property
    def method(self) -> str:
        """The name by which the command knows what it trains with."""
        words = self.words.split()
        return words[words.index("--method") + 1]


def table(minutes: float = 4.0) -> list[Run]:
    """All runs in the order in which they are made, so that each prefix is a study; `minutes`: of a run by rewards.

    A student of segments is trained for as long at 4, 2 and 1 steps together as a MeanFlow or consistency model.
    """
    reward = "reward --things 2 --draw-dtype bfloat16"
    drawn = (REWARD_STEPS,)
    true = [Run(name, REWARDED, f"{reward} --reward shapes {words}", minutes, drawn) for name, words in METHODS.items()]
    segments = [
        Run("segments to 4", DISTILLED, _distill("segments", 4), 4.0, (4, 2, 1)),
        Run("segments to 2", DISTILLED, _distill("segments", 2), 4.0, (2, 1), start="segments to 4"),
        Run("segments to 1", DISTILLED, _distill("segments", 1), 4.0, (1,), start="segments to 2"),
    ]
    after = Run(
        "NFT after segments", REWARDED, f"{reward} --reward shapes --method nft --sampling-steps 4", minutes, (4,),
        start="segments to 4",
    )  # fmt: skip
    proxy = [
        Run(f"{name} by colours", REWARDED, f"{reward} --reward colours {METHODS[name]}", minutes, drawn)
        for name in PROXIES
    ]
    whole = [Run(name, DISTILLED, _distill(STUDENTS[name], 4), 12.0, STUDENT_STEPS) for name in ("MeanFlow", "sCM")]
    once = [*true, *segments, after, *proxy[:2], *whole, *proxy[2:]]
    return [run._replace(seed=seed) for seed in SEEDS for run in once]


def is_known(run: Run) -> bool:
    """False for a method of `distill` that this version does not have."""
    return run.kind != DISTILLED or run.method in distill_options.METHODS


def chosen(runs: Iterable[Run], names: Sequence[str], seeds: int) -> list[Run]:
    """The runs of the first `seeds` seeds that `names` names, by default all.

    Raises ValueError for a name that no run has.
    """
    runs = list(runs)
    if unknown := [name for name in names if name not in {run.name for run in runs}]:
        known = ", ".join(dict.fromkeys(run.name for run in runs))
        raise ValueError(f"--run {unknown[0]!r} must be one of {known}")
    return [run for run in runs if run.seed < seeds and (not names or run.name in names)]


def _distill(method: str, to: int) -> str:
    return f"distill --to {to} --pictures 2048 --teacher-dtype bfloat16 --method {method}"
