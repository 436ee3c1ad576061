"""The pages of the course and its programs, docs/learn/, which are in no package."""

import importlib.util

from tests.docs import markdown

COURSE = markdown.ROOT / "docs" / "learn"
PAGES = sorted(COURSE.glob("[0-9][0-9]-*.md"))
RUNNER = COURSE / "run.py"


def program(name):
    """The module docs/learn/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, COURSE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runner():
    """The module docs/learn/run.py."""
    return program("run")
