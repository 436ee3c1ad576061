"""Runs programs, each in a clean interpreter: this process imports torch, then forks for every program.

A line of standard input is a JSON object {"folder", "blocks": [{"name", "line", "text"}, ...]}: the blocks share one
namespace. A line of standard output answers it: a JSON string, the traceback or nothing.
"""

import json
import os
import sys
import traceback

import torch

torch.set_num_threads(1)


def run(folder: str, blocks: list[dict]) -> str:
    """The traceback of the first block that raises, or nothing. Lines count from the top of the page."""
    os.chdir(folder)
    namespace = {"__name__": "__main__"}
    for block in blocks:
        try:
            exec(compile("\n" * (block["line"] - 1) + block["text"], block["name"], "exec"), namespace)
        except BaseException:
            return traceback.format_exc()
    return ""


def result(request: dict) -> str:
    """`run` in a process of its own."""
    reader, writer = os.pipe()
    if not os.fork():
        os.dup2(2, 1)
        os.write(writer, run(**request).encode()[-4000:])
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.wait()
    return said or (f"ended with status {status}" if status else "")


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(result(json.loads(line))), flush=True)
