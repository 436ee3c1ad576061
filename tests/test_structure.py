"""Packages: imports point down the page only, and importing the program costs what torch costs."""

import ast
import functools
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "functional_sd3"
NETWORKS = {"core", "parallel", "formats", "text", "image", "transformer", "flow"}
ALLOWED = {
    "core": set(),
    "kernels": {"core"},
    "parallel": {"core"},
    "formats": {"core"},
    "text": {"core", "parallel", "formats"},
    "image": {"core", "formats"},
    "transformer": {"core", "parallel"},
    "flow": {"core"},
    "layouts": NETWORKS,
    "lora": {"core", "formats", "layouts"},
    "weights": NETWORKS | {"layouts", "lora"},
    "pipeline": NETWORKS | {"layouts", "lora", "weights"},
    "training": NETWORKS | {"layouts", "lora", "weights"},
    "metrics": {"core", "formats", "text", "image"},
}
"""Package -> the packages it may import."""
ALLOWED["look"] = NETWORKS | {"layouts", "lora", "weights", "pipeline"}
ALLOWED["recipes"] = set(ALLOWED)
ALLOWED["cli"] = set(ALLOWED)

RUN_TIME = {"torch", "safetensors", "einops", "numpy", "PIL", "scipy", "tqdm"}
EXTRAS = {"cli/app": {"gradio", "fastapi", "uvicorn"}}
"""Folder -> the packages of an extra that its files may import."""
FILES = sorted(PACKAGE.rglob("*.py"))


LOOKED_UP_LATER = {("core/dispatch.py", "kernels")}
"""The one pointer up the page: the table of kernels, read when an operation is first called."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


class Facts(NamedTuple):
    """Facts of a file's syntax tree that several tests read, so that each file is parsed once."""

    imported: frozenset[str]
    """Full names that are imported anywhere in the file, inside functions and for the type checker too."""
    docstrings: tuple[tuple[int, str], ...]
    """Line and text of each docstring, those below constants and fields too."""
    bound: frozenset[str]
    """Names of variables, arguments, functions and classes."""
    bare: tuple[str, ...]
    """Public functions of the module without a docstring, or with an argument or a result without a type."""


@functools.cache
def facts(path: Path) -> Facts:
    imported: set[str] = set()
    docstrings = []
    bound = set()
    module = ast.parse(path.read_text())
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = path.relative_to(PACKAGE.parent).parts[: -node.level]
            source = ".".join([*package, *([node.module] if node.module else [])])
            imported |= {f"{source}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.append((node.lineno, node.value.value))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    bare = tuple(function.name for function in functions if is_bare(function))
    return Facts(frozenset(imported), tuple(docstrings), frozenset(bound), bare)


def is_bare(function: ast.FunctionDef) -> bool:
    arguments = function.args
    typed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    is_overload = any(ast.unparse(each) == "overload" for each in function.decorator_list)
    is_typed = function.returns is not None and all(argument.annotation for argument in typed)
    return not is_typed or not (is_overload or ast.get_docstring(function))


def imported_names(path: Path) -> frozenset[str]:
    return facts(path).imported


def packages_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported_names(path) if name.startswith("functional_sd3.")}


def modules_imported(path: Path) -> set[str]:
    """The modules of the package that a file imports: the longest part of each name that is one."""
    modules = set()
    for name in imported_names(path):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        modules.add(name)
    own = str(path.relative_to(PACKAGE))
    later = {f"functional_sd3.{package}" for file, package in LOOKED_UP_LATER if file == own}
    return modules - {"", "functional_sd3"} - later


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of a circle of a graph, in order; none if it has no circle."""
    finished: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node not in finished:
            for target in sorted(graph.get(node, ())):
                if round_trip := visit(target, [*path, node]):
                    return round_trip
            finished.add(node)
        return []

    return next((nodes for node in sorted(graph) if (nodes := visit(node, []))), [])


def test_circles_are_seen():
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"a"}}) == ["a"]


def test_no_files_import_each_other_in_a_circle():
    assert circle({name: modules_imported(path) for name, path in MODULES.items()}) == []


def test_no_packages_import_each_other_in_a_circle():
    packages: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        if name.count("."):
            package = name.split(".")[1]
            targets = {module.split(".")[1] for module in modules_imported(path)}
            packages[package] = packages.get(package, set()) | (targets - {package})
    assert circle(packages) == []


def test_no_test_module_imports_another():
    tests = Path(__file__).parent
    for path in sorted(tests.rglob("*.py")):
        guests = {name for name in imported_names(path) if any(p.startswith("test_") for p in name.split("."))}
        assert not guests, f"{path.relative_to(tests)} imports {sorted(guests)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_the_page(path):
    parts = path.relative_to(PACKAGE).parts
    package = parts[0].removesuffix(".py")
    if package in ("__init__", "__main__"):
        return
    upward = packages_imported(path) - ALLOWED[package] - {package}
    upward -= {target for file, target in LOOKED_UP_LATER if path == PACKAGE / file}
    assert not upward, f"{package} must not import {sorted(upward)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_run_time_packages_are_imported(path):
    import sys

    extra = EXTRAS.get(str(path.relative_to(PACKAGE).parent), set())
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            top = name.split(".")[0]
            assert top in RUN_TIME | extra | {"functional_sd3"} or top in sys.stdlib_module_names, (
                f"{path} imports {name}"
            )


def test_every_public_name_is_its_module():
    import functional_sd3 as sd3

    assert len(sd3.__all__) > 30 and set(sd3.__all__) <= set(dir(sd3))
    longer = {
        "clip_dual": "clip.dual",
        "clip_image": "clip.image",
        "image_folders": "folders",
        "inversion": "textual_inversion",
        "losses": "objectives",
        "pictures": "folders",
    }
    assert set(longer) <= set(sd3.__all__)
    for name in sd3.__all__:
        module = getattr(sd3, name)
        assert f".{module.__name__}".endswith(f".{longer.get(name, name)}")
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        sd3.unknown  # noqa: B018


def test_importing_the_program_loads_no_heavy_package_besides_torch():
    import subprocess
    import sys

    script = (
        "import sys, torch; before = set(sys.modules); import functional_sd3 as sd3; "
        "[getattr(sd3, name) for name in sd3.__all__]; "
        "print(sorted({'scipy', 'PIL', 'tqdm', 'torch._dynamo', 'torch._inductor'} & (set(sys.modules) - before)))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_loading_weights_loads_no_compiler(tmp_path):
    import subprocess
    import sys

    script = (
        "import sys; from functional_sd3 import weights, shipped; model = weights.load(shipped.folder()); "
        "weights.save(sys.argv[1], model, layout='single'); weights.load(sys.argv[1]); weights.describe(sys.argv[1]); "
        "shapes = weights.files.shapes(sys.argv[1]); weights.infer_config(shapes); "
        "print(sorted({'torch._dynamo', 'torch._inductor', 'sympy', 'scipy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "x.safetensors")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_images_are_opened_in_one_module():
    opening = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Attribute) and ast.unparse(node).endswith("Image.open")
            imported = isinstance(node, ast.ImportFrom) and node.module == "PIL.Image"
            if named or imported and any(alias.name == "open" for alias in node.names):
                opening.add(str(path.relative_to(PACKAGE)))
    assert opening == {"image/files.py"}


def test_docstrings_begin_with_the_object_that_they_describe():
    """NAMES: the first sentence of a docstring names the object, and does not begin with a relative clause."""
    riddle = re.compile(r"\s*(What|Which|Who|Whom|Whether|Where|Why|How|Of|That of|Those|Its|As `|Raise)\b")
    found = [
        f"{path.relative_to(PACKAGE)}:{line} {text.strip()[:60]}"
        for path in FILES
        for line, text in facts(path).docstrings
        if riddle.match(text)
    ]
    assert not found, f"name the object, and write 'Raises ValueError', not 'Raise': {found}"


def test_sentences_begin_with_their_subject():
    """NAMES, rule 5: a sentence of a comment or a docstring does not begin with What or Who."""
    comment = re.compile(r"^\s*# ?(What|Who|Whom|Of what|Of which|Where nobody)\b", re.MULTILINE)
    sentence = re.compile(r"[.:]\s+((?:What|Who|Whom|Of what|Of which) \S+ \S+)")
    found = []
    for path in FILES:
        words = comment.findall(path.read_text())
        words += [words for _, text in facts(path).docstrings for words in sentence.findall(text)]
        found += [f"{path.relative_to(PACKAGE)}: {' '.join(each.split())}" for each in words]
    assert not found, found


def test_docstrings_and_comments_are_in_plain_words():
    """NAMES, rules 2 and 5: the field's terms and plain verbs, no metaphors of telling, hearing, standing and going."""
    words = "nobody somebody anybody people told heard asked unasked vouches rooms stands(?! for) goes.on go.on begun"
    metaphor = re.compile(rf"\b({'|'.join(words.split())})\b|\b(as of) `")
    found = []
    for path in FILES:
        texts = [text for _, text in facts(path).docstrings]
        texts += re.findall(r"(?:^|\s)# (.*)$", path.read_text(), re.MULTILINE)
        found += [f"{path.relative_to(PACKAGE)}: {word[0]}" for text in texts for word in metaphor.finditer(text)]
    assert not found, found


def test_names_are_what_a_thing_is():
    """NAMES, rule 2: participles and metaphors are no names."""
    metaphors = set("told asked asks begun bent drawn found said says speaking heard meant gone stranger rooms".split())
    names = {str(path.relative_to(PACKAGE)): sorted(metaphors & facts(path).bound) for path in FILES}
    assert not any(names.values()), {path: bound for path, bound in names.items() if bound}


def test_nothing_is_defined_that_nothing_uses():
    """A private name occurs in its file again; a public one in the package, tests, benchmarks or documentation."""
    root = PACKAGE.parent
    defined = re.compile(r"^(?:def|class) (\w+)|^(\w+)(?:: [^=\n]+)? = ", re.MULTILINE)
    others = [root / "README.md", *(root / "docs").rglob("*.md")]
    others += [path for folder in ("tests", "bench", "docs") for path in (root / folder).rglob("*.py")]
    words = {path: Counter(re.findall(r"\w+", path.read_text())) for path in FILES}
    everywhere = Counter(word for path in others for word in re.findall(r"\w+", path.read_text()))
    for counted in words.values():
        everywhere.update(counted)
    unused = []
    for path in FILES:
        for function, constant in defined.findall(path.read_text()):
            name = function or constant
            occurrences = words[path] if name.startswith("_") else everywhere
            if occurrences[name] < 2 and not name.startswith("__"):
                unused.append(f"{path.relative_to(PACKAGE)}: {name}")
    assert not unused, unused


def test_public_functions_have_a_docstring_and_types():
    """Those of cli, of which each command has the same three, aside."""
    bare = {str(path.relative_to(PACKAGE)): facts(path).bare for path in FILES}
    bare = {path: names for path, names in bare.items() if names and not path.startswith("cli/")}
    assert not bare, bare
