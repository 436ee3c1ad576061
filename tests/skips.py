"""What a test run skipped for want of what, and how to bring it."""

from collections import Counter

REMEDIES = {
    "glibc 2.35": "run on a Linux with glibc 2.35 or newer",
    "real SD3.5 tokenizer files": "put the folders tokenizer, tokenizer_2 and tokenizer_3 of a Stable Diffusion 3.5 "
    "repository on Hugging Face, and openai/clip-vit-large-patch14's tokenizer.json as clip-tokenizer.json, into "
    "../shared/data/tokenizers",
    "GPU": "run on a machine with an Nvidia GPU and a CUDA build of PyTorch",
    "Chromium": "install Chromium (Debian: apt-get install chromium), or Chrome",
    "C++ compiler": "install g++ or clang and the headers of Python",
    "could not import 'tensorboard'": "pip install '.[tensorboard]'",
    "could not import 'openvino'": "pip install '.[bench]'",
    "could not import": "make test installs it; by hand: pip install '.[test]'",
    "AVIF": "install a Pillow with AVIF (those of its project for common systems have it)",
    "products of int8": "run on a processor with VNNI, AMX or I8MM, and oneDNN not held to less",
    "AVX512": "run on an x86 processor with AVX512",
    "MKL": "use a build of PyTorch with MKL (those for x86 have it)",
    "oneDNN": "use a build of PyTorch with oneDNN",
    "Linux": "run on Linux",
    "/proc": "run on Linux",
    "named pipes": "run on Linux or macOS",
    "os.fork": "run on Linux or macOS",
    "root": "run as a user who is not root",
}
"""Words of a skip's reason -> how to bring what is wanting."""


def pytest_terminal_summary(terminalreporter) -> None:
    """Writes the section. With xdist it runs in the process that has the reports of all workers."""
    lines = skip_lines([report.longrepr[2] for report in terminalreporter.stats.get("skipped", ())])
    if lines:
        terminalreporter.section("skipped")
        for line in lines:
            terminalreporter.write_line(line)


def skip_lines(reasons: list[str]) -> list[str]:
    """A line for each reason, the most frequent first: how many tests, why, and the remedy where one is known."""
    lines = []
    for reason, count in Counter(reason.removeprefix("Skipped: ") for reason in reasons).most_common():
        tests = "1 test" if count == 1 else f"{count} tests"
        how = remedy(reason)
        lines.append(f"{tests} skipped: {reason}" + (f"; to run: {how}" if how else ""))
    return lines


def remedy(reason: str) -> str | None:
    """How to bring what the reason of a skip says is wanting, where that is known."""
    return next((text for words, text in REMEDIES.items() if words in reason), None)
