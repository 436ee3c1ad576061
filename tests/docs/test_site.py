"""The site of `make docs`, without building it: settings, navigation, pages, links to the glossary, dead links."""

import importlib
import re
import subprocess
import sys

import pytest
import yaml

import functional_sd3 as sd3
from tests.docs import markdown

FOLDER = markdown.ROOT / "docs" / "site"


@pytest.fixture
def site(monkeypatch):
    """The modules of docs/site, a folder that is run and in no package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_settings_parse_load_nothing_from_elsewhere_and_name_folders_only_in_the_program(site):
    settings = yaml.safe_load((FOLDER / "zensical.yml").read_text(encoding="utf-8"))
    assert settings["theme"]["font"] is False
    assert settings["plugins"].keys() == {"search", "mkdocstrings"}
    assert not {"nav", "docs_dir", "site_dir"} & settings.keys()


def test_every_markdown_file_of_the_repository_is_in_the_navigation(site):
    there = _paths(site("navigation").build())
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=markdown.ROOT, capture_output=True, text=True)
    files = tracked.stdout.split() or [str(page.relative_to(markdown.ROOT)) for page in markdown.PAGES]
    assert len(files) > 30 and not set(files) - set(there)
    assert len(there) == len(set(there))


def test_a_page_that_the_readme_does_not_name_is_an_error(site, monkeypatch):
    navigation = site("navigation")
    pages = [*site("sources").markdown_files(), "docs/new.md"]
    monkeypatch.setattr(navigation.sources, "markdown_files", lambda: pages)
    monkeypatch.setattr(navigation, "programs", lambda: [])
    with pytest.raises(navigation.NavigationError, match=r"docs/new\.md: not linked in the table of README\.md"):
        navigation.build()


def test_every_public_module_has_a_page_of_the_reference_and_an_entry_of_the_navigation(site, tmp_path):
    reference = site("reference")
    reference.write(tmp_path)
    pages = {reference.page_of(module): module for module in reference.modules()}
    assert len(pages) == len(reference.modules()) > 400
    assert set(_paths(reference.navigation())) == pages.keys()
    for page, module in pages.items():
        assert (tmp_path / page).read_text().startswith(f"::: {module}\n")
    assert set(sd3.__all__) == reference.flat_names().keys()
    assert set(reference.flat_names().values()) <= reference.modules().keys()


def test_pages_are_written_with_the_files_that_they_link_and_programs_as_pages(site, tmp_path):
    navigation, sources = site("navigation"), site("sources")
    sources.write(tmp_path, navigation.programs())
    assert (tmp_path / "docs" / "samples.png").is_file() and (tmp_path / "docs" / "prompts.txt").is_file()
    assert "def " in (tmp_path / "docs" / "examples" / "plain_sd3.py.md").read_text()
    assert "](docs/examples/plain_sd3.py.md)" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[a](b.py) and [c](d.md#e)", "[a](b.py.md) and [c](d.md#e)"),
        ("<details><summary>Answer</summary>", '<details markdown="1"><summary>Answer</summary>'),
        ("one\n- two\n  three\n- four", "one\n\n- two\n  three\n- four"),
        ("```sh\n[a](b.py)\n- c\n```", "```sh\n[a](b.py)\n- c\n```"),
        ("[a](https://b.c/d.py)", "[a](https://b.c/d.py)"),
    ],
)
def test_pages_are_written_in_the_generators_way_outside_of_code(site, text, expected):
    assert site("sources").for_generator(text) == expected


def test_terms_of_the_glossary_are_linked_once_a_page_in_docstrings_alone(site):
    terms = site("terms")
    spellings = terms.terms("### Rectified flow\n\nA.\n\n### Latents\n\nB.\n\n### Path\n\nC.\n")
    assert spellings == {"rectified flow": "rectified-flow", "latents": "latents"}  # "Path" is a file's too.
    inside = "<p>Latents &lt; <code>latents</code> of rectified flows, latents</p>"
    page = f'<p>Latents</p><div class="x doc-contents">{inside}</div>'
    linked = terms.link(page, spellings, "../glossary.html")
    assert re.sub(r"</?a[^>]*>", "", linked) == page
    assert re.findall(r'<a class="term" href="([^"]+)">([^<]+)', linked) == [
        ("../glossary.html#latents", "Latents"),
        ("../glossary.html#rectified-flow", "rectified flows"),
    ]


def test_words_that_are_left_out_of_the_terms_are_in_the_glossary(site):
    terms = site("terms")
    headings = {each.lower() for each in re.findall(r"^### (.+)$", _glossary(), re.MULTILINE)}
    assert terms.AMBIGUOUS <= headings
    assert len(terms.terms(_glossary())) > 100


def _glossary() -> str:
    return (markdown.ROOT / "docs" / "learn" / "glossary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "body, said",
    [
        ('<a href="b.html#there">', []),
        ('<a href="b.html#away">', ["index.html: b.html#away has no such anchor"]),
        ('<a href="c.html">', ["index.html: c.html is not there"]),
        ('<a href="../secret">', ["index.html: ../secret is not there"]),
        ('<img src="no.png"/>', ["index.html: no.png is not there"]),
        ('<a href="https://a.b">', []),
        ('<script src="https://a.b/c.js"></script>', ["index.html: https://a.b/c.js is loaded from elsewhere"]),
    ],
)
def test_dead_links_and_what_is_loaded_from_elsewhere_are_found(site, tmp_path, body, said):
    (tmp_path / "index.html").write_text(body)
    (tmp_path / "b.html").write_text('<p id="there">')
    assert site("check").problems(tmp_path) == said


def test_only_a_site_is_replaced_by_one(tmp_path):
    """`python docs/site FOLDER` with a folder of other things would delete them."""
    (tmp_path / "thesis.txt").write_text("mine")
    for place, said in ((tmp_path, "holds files and no site"), (tmp_path / "thesis.txt", "is a file")):
        words = [sys.executable, str(FOLDER), str(place)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and said in done.stderr and str(place) in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def _paths(navigation) -> list[str]:
    if isinstance(navigation, str):
        return [navigation]
    inside = navigation.values() if isinstance(navigation, dict) else navigation
    return [path for each in inside for path in _paths(each)]
