"""Fixtures of the rows, and bench/RESULTS.md, written at the end."""

import os
import warnings
from pathlib import Path

import pytest
import torch

from bench import table, timing


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=2, help="threads of both sides")
    parser.addoption("--quick", action="store_true", help="one round a row: does everything still run?")
    parser.addoption("--rounds", type=int, default=None, help="at most so many rounds a row")
    parser.addoption("--results", type=Path, default=None, help="Markdown file for the table")


@pytest.fixture(scope="session", autouse=True)
def same_threads(request):
    threads = request.config.getoption("--threads")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")


@pytest.fixture
def versus(benchmark, request):
    most = 1 if request.config.getoption("--quick") else request.config.getoption("--rounds")
    return timing.Versus(benchmark, most=most)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["threads"] = config.getoption("--threads")
    if path := config.getoption("--results"):
        path.write_text(table.page(output_json))


def pytest_benchmark_update_machine_info(config, machine_info):
    import importlib.metadata

    # A machine's own name says nothing about its speed.
    machine_info.pop("node", None)
    names = ("torch", "diffusers", "transformers", "tokenizers", "numpy", "scipy")
    machine_info["versions"] = {name: importlib.metadata.version(name) for name in names}
