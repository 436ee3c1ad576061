"""Pages of the API reference: one for every public module, from its docstrings, and one of the names of `sd3`."""

import ast
import posixpath
from pathlib import Path, PurePosixPath

import sources

PACKAGE = "functional_sd3"
FOLDER = "api"


def modules() -> dict[str, Path]:
    """Every public module -> its file: those whose dotted name has no part that begins with an underscore."""
    found = {}
    for path in sorted((sources.ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(sources.ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            found[".".join(parts)] = path
    return dict(sorted(found.items()))


def page_of(module: str) -> str:
    """Path of a module's page; that of a package is the index of its folder."""
    inside = module.split(".")[1:]
    if modules_below(module):
        return "/".join([FOLDER, *inside, "index.md"])
    return "/".join([FOLDER, *inside]) + ".md"


def modules_below(module: str) -> list[str]:
    """Modules directly inside a package, in the order of their names; none of a file."""
    depth = module.count(".") + 1
    return [each for each in _MODULES if each.startswith(f"{module}.") and each.count(".") == depth]


def summary(module: str) -> str:
    """First paragraph of a module's docstring, for a cell of a table."""
    return sources.first_sentence(_MODULES[module].read_text(encoding="utf-8")).replace("|", r"\|")


def flat_names() -> dict[str, str]:
    """Name of `sd3.NAME` -> its module, as the package's stub imports them."""
    statements = ast.parse((sources.ROOT / PACKAGE / "__init__.pyi").read_text(encoding="utf-8")).body
    imports = [each for each in statements if isinstance(each, ast.ImportFrom)]
    return {alias.asname: f"{each.module}.{alias.name}" for each in imports for alias in each.names if alias.asname}


def write(into: Path) -> None:
    """The pages, into the site's sources."""
    for module in _MODULES:
        path = into / page_of(module)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = first_page() if module == PACKAGE else f"::: {module}\n{_table(module, modules_below(module))}"
        path.write_text(text, encoding="utf-8")


def first_page() -> str:
    """The package's page: its docstring, the names of `sd3` and the packages."""
    names = flat_names()
    rows = [f"| [`sd3.{name}`]({_link(PACKAGE, names[name])}) | {summary(names[name])} |" for name in sorted(names)]
    head = "| name | |\n|---|---|\n"
    flat = f"## Names of `import functional_sd3 as sd3`\n\n{head}" + "\n".join(rows)
    return f"::: {PACKAGE}\n\n{flat}\n{_table(PACKAGE, modules_below(PACKAGE))}"


def navigation() -> list:
    """Nested by packages."""
    return _navigation(PACKAGE)


def _navigation(package: str) -> list:
    entries: list = [page_of(package)]
    for module in modules_below(package):
        name = module.rpartition(".")[2]
        entries.append({name: _navigation(module) if modules_below(module) else page_of(module)})
    return entries


def _table(package: str, inside: list[str]) -> str:
    if not inside:
        return ""
    rows = [f"| [`{each.rpartition('.')[2]}`]({_link(package, each)}) | {summary(each)} |" for each in inside]
    return "\n## Modules\n\n| module | |\n|---|---|\n" + "\n".join(rows) + "\n"


def _link(source: str, target: str) -> str:
    return posixpath.relpath(page_of(target), str(PurePosixPath(page_of(source)).parent))


_MODULES = modules()
