"""Fixtures of the rows, and bench/RESULTS.md, written after every row."""

import datetime
import importlib.metadata
import os
import platform
import time
import warnings
from pathlib import Path

import pytest
import torch

from bench import table, timing
from functional_sd3.kernels.processor import identify

ROWS = pytest.StashKey()
"""The rows of this run, in their order."""


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=2, help="threads of both sides")
    parser.addoption("--quick", action="store_true", help="one round a row: does everything still run?")
    parser.addoption("--rounds", type=int, default=None, help="at most so many rounds a row")
    parser.addoption(
        "--cpu-time", action="store_true", help="processor time of both sides; `python -m bench` sets the rest"
    )
    parser.addoption("--results", type=Path, default=None, help="Markdown file for the table")


@pytest.fixture(scope="session", autouse=True)
def same_threads(request):
    threads = request.config.getoption("--threads")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")


@pytest.fixture
def versus(benchmark, request):
    option = request.config.getoption
    clock = timing.processor_time if option("--cpu-time") else time.perf_counter

    def write(row):
        request.config.stash[ROWS].extend(table.rows_of(row))
        if path := option("--results"):
            page = path.read_text(encoding="utf-8") if path.exists() else ""
            path.write_text(table.updated(page, setting(request.config), row), encoding="utf-8")

    most = 1 if option("--quick") else option("--rounds")
    return timing.Versus(benchmark, most=most, clock=clock, on_row=write)


def pytest_configure(config):
    config.stash[ROWS] = []


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[ROWS]:
        terminalreporter.write_line("\n" + table.printed(config.stash[ROWS]))


def setting(config):
    """Where and when rows of this run are measured."""
    threads = config.getoption("--threads")
    clock = "processor time" if config.getoption("--cpu-time") else "wall time"
    measured = f"{threads} thread{'s' * (threads > 1)}, {clock}, {datetime.date.today()}"
    return table.Setting(processor(), measured, {"Python": platform.python_version(), **versions()})


def processor():
    """Its brand with family and instruction set, since one brand ("AMD EPYC") is of several generations."""
    here = identify()
    family = f" of family {here.family}" if here.family else ""
    return f"{_brand()}{family} with {here.capability}"


def _brand():
    try:
        import cpuinfo

        return cpuinfo.get_cpu_info()["brand_raw"]
    except Exception:  # A processor without a name that this can find.
        return platform.processor() or platform.machine()


def versions():
    names = ["torch", "diffusers", "transformers", "tokenizers", "numpy", "scipy"]
    return {name: importlib.metadata.version(name) for name in names}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["threads"] = config.getoption("--threads")


def pytest_benchmark_update_machine_info(config, machine_info):
    # A machine's own name says nothing about its speed.
    machine_info.pop("node", None)
    machine_info["versions"] = versions()
