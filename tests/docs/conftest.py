"""The folder in which the pages' commands run: the checkout's files, and stand-ins for downloads."""

import os
import shutil

import pytest

from tests.docs import stand_ins


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    top = tmp_path_factory.mktemp("inputs")
    stand_ins.make(top)
    return top


@pytest.fixture
def folder(inputs, tmp_path, monkeypatch):
    """A reader's folder of its own: hard links to the inputs, as saving replaces files and never writes into them."""
    shutil.copytree(inputs, tmp_path / "here", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"
