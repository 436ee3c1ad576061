"""`python docs/site [SITE]` builds the site: README, course, guides, gallery and API reference, with search.

The pages are assembled in build/docs, rendered by zensical and mkdocstrings without a warning, their terms are linked
to the glossary and their links checked; only then is SITE (default site/) replaced.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import check
import navigation
import reference
import sources
import terms
import yaml

HERE = Path(__file__).resolve().parent
MADE = ("index.html", "search.json")
"""Files of every site that this program built."""
BUILD = sources.ROOT / "build" / "docs"


def settings() -> dict:
    """The generator's settings: those of zensical.yml, the navigation and the folders."""
    read = yaml.safe_load((HERE / "zensical.yml").read_text(encoding="utf-8"))
    read["plugins"]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(sources.ROOT)]
    return read | {"docs_dir": "pages", "site_dir": "html", "nav": navigation.build()}


def assemble() -> Path:
    """Writes pages and settings, and returns the settings' path."""
    shutil.rmtree(BUILD, ignore_errors=True)
    sources.write(BUILD / "pages", navigation.programs())
    reference.write(BUILD / "pages")
    shutil.copy(HERE / "site.css", BUILD / "pages")
    path = BUILD / "mkdocs.yml"  # The generator reads YAML, which JSON is.
    path.write_text(json.dumps(settings(), indent=1), encoding="utf-8")
    return path


def refusal(site: Path) -> str:
    """The sentence for a folder that must not be replaced, as a site was not what filled it; "" for any other."""
    if site.exists() and not site.is_dir():
        return f"{site} is a file; name a folder for the site"
    if site.is_dir() and any(site.iterdir()) and not all((site / name).is_file() for name in MADE):
        return f"{site} holds files and no site, and would be replaced: name a folder that is new or empty"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the documentation as a site.")
    parser.add_argument("site", nargs="?", type=Path, default=sources.ROOT / "site", help="folder (default site/)")
    site = parser.parse_args().site
    if reason := refusal(site):
        print(reason, file=sys.stderr)
        return 2
    words = ["zensical", "build", "--strict", "--clean", "-f", str(assemble())]
    done = subprocess.run([str(Path(sys.executable).with_name(words[0])), *words[1:]], capture_output=True, text=True)
    print(done.stdout, end="")
    if done.returncode:
        print(done.stderr.splitlines()[-1] if done.stderr else f"{words[0]} ended with {done.returncode}")
        return 1
    html = BUILD / "html"
    glossary = (sources.ROOT / f"{terms.GLOSSARY}.md").read_text(encoding="utf-8")
    print(f"{terms.link_all(html, reference.FOLDER, glossary)} links to the glossary")
    if check.main(str(html)):
        return 1
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(html, site)
    print(f"{site}: open index.html, or `python -m http.server -d {site}` for the search")
    return 0


if __name__ == "__main__":
    sys.exit(main())
