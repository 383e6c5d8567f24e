"""Which module may import which, read from the sources: the order of docs/architecture.md, "Files, bottom up"."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"qcompile": ROOT / "qcompile", "qcompile.passes": ROOT / "passes", "qcompile.codegen": ROOT / "codegen"}
LINKS = {FOLDERS["qcompile"] / "passes", FOLDERS["qcompile"] / "codegen"}

ON_TOP = {"calibrate", "quantize", "decorator", "report", "evaluate", "checkpoint", "integrations", "cli"}
CODEGEN_MAY_IMPORT = {
    "codegen",
    "errors",
    "expr",
    "flags",
    "formats",
    "gates",
    "kv_cache",
    "layouts",
    "linear_spec",
    "norm_spec",
    "places",
    "powers",
    "scheme",
}
PRIVATE_TORCH = {"_C", "_dynamo", "_functorch", "_guards", "_higher_order_ops", "_inductor", "_subclasses"}
OPERATORS = {"ops", "norms", "grouped", "attention"}
"""What reaches the runtime, inside functions."""
HEAVY = {"triton", "transformers", "torchao", "gguf", "scipy"}
"""Packages that importing qcompile must not import."""


@dataclass(frozen=True)
class Import:
    """One imported module, as `a.b.c`; `local` says that it lies in a function or under TYPE_CHECKING."""

    importer: str
    target: str
    local: bool
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


@cache
def sources() -> dict[str, Path]:
    """Every module of the package, by its name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            if not any(link in path.parents for link in LINKS):
                parts = path.relative_to(folder).with_suffix("").parts
                found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text())


def read_imports(importer: str, parsed: ast.AST, modules: set[str]) -> list[Import]:
    """All imports in a syntax tree; `from a import b` names `a.b` where that is a module, else `a`."""
    found = []

    def visit(node: ast.AST, local: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(importer, alias.name, local, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}:{node.lineno} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                target = full if full in modules else str(node.module)
                found.append(Import(importer, target, local, node.lineno))
        inner = local or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and child in node.body
            visit(child, inner or checking)

    visit(parsed, False)
    return found


@cache
def imports() -> tuple[Import, ...]:
    names = set(sources())
    return tuple(found for module in names for found in read_imports(module, tree(module), names))


def unit(module: str) -> str:
    """The part of the package that a module belongs to: `scheme`, `passes`, ...; "" for qcompile itself."""
    return module.split(".")[1] if "." in module else ""


def own() -> list[Import]:
    """Imports of one part by another."""
    return [i for i in imports() if i.target.split(".")[0] == "qcompile" and unit(i.target) != unit(i.importer)]


def documented_order() -> dict[str, int]:
    """Every part and the row of the architecture's table that it stands in, counted from the bottom layer."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("## Files, bottom up")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name.rstrip("/"): row for row, names in enumerate(rows) for name in re.findall(r"`([\w/]+)`", names)}


def test_the_checks_see_what_they_look_for():
    code = "import a\nfrom torch import _dynamo\ndef f():\n    from q import m, name\nif TYPE_CHECKING:\n    import b"
    found = {(i.target, i.local) for i in read_imports("x", ast.parse(code), {"q.m"})}
    assert found == {("a", False), ("torch", False), ("q.m", True), ("q", True), ("b", True)}
    assert private_torch(
        ast.parse("import torch._C\ntorch._inductor.config.x = 1\ntorch._int_mm(a)\nfrom torch import _guards")
    ) == [1, 2, 4]
    assert len(sources()) > 50
    assert len(own()) > 100


def test_the_architecture_names_every_part():
    assert set(documented_order()) == {unit(module) for module in sources()} - {""}


def test_modules_import_downwards():
    order = documented_order()
    wrong = [
        str(i)
        for i in own()
        if i.importer != "qcompile" and unit(i.target) and order[unit(i.target)] > order[unit(i.importer)]
        if not (i.local and unit(i.importer) in OPERATORS and unit(i.target) == "runtime")
    ]
    assert not wrong


def test_leaves_import_nothing_of_qcompile():
    leaves = [name for name, row in documented_order().items() if row == 0]
    assert {"errors", "flags", "expr"} <= set(leaves)
    assert not [str(i) for i in own() if unit(i.importer) in leaves]


def test_no_import_cycles():
    graph: dict[str, set[str]] = {module: set() for module in sources()}
    for i in imports():
        if i.target in graph and not i.local and i.target != "qcompile":
            graph[i.importer].add(i.target)
    graphlib.TopologicalSorter(graph).prepare()


def test_passes_and_codegen_never_import_each_other():
    pairs = {("passes", "codegen"), ("codegen", "passes")}
    assert not [str(i) for i in own() if (unit(i.importer), unit(i.target)) in pairs]


def test_codegen_knows_formats_and_specs_only():
    assert not [str(i) for i in own() if unit(i.importer) == "codegen" and unit(i.target) not in CODEGEN_MAY_IMPORT]


def test_runtime_is_imported_lazily():
    loading = [i for i in own() if unit(i.target) == "runtime" and not i.local]
    assert not [str(i) for i in loading if unit(i.importer) not in ON_TOP]
    assert {unit(i.importer) for i in own() if unit(i.target) == "runtime"} <= OPERATORS | ON_TOP


def test_nothing_below_imports_what_is_on_top():
    assert not [
        str(i) for i in own() if unit(i.target) in ON_TOP and unit(i.importer) not in ON_TOP and unit(i.importer)
    ]
    order = documented_order()
    assert {name for name, row in order.items() if row == max(order.values())} == ON_TOP


def test_the_root_is_imported_on_top_only():
    assert not [str(i) for i in own() if i.target == "qcompile" and unit(i.importer) not in {"cli", "evaluate"}]


def private_torch(parsed: ast.AST) -> list[int]:
    """Lines that import a private module of torch or reach one as an attribute."""
    lines = set()
    for node in ast.walk(parsed):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        parts = [name.split(".") for name in names]
        lines |= {node.lineno for p in parts if len(p) > 1 and p[0] == "torch" and p[1] in PRIVATE_TORCH}
    return sorted(lines)


@pytest.mark.parametrize("module", sorted(set(sources()) - {"qcompile.compat"}))
def test_private_torch_is_in_compat_only(module):
    assert private_torch(tree(module)) == []


def test_heavy_packages_are_imported_in_functions():
    loading = [i for i in imports() if i.target.split(".")[0] in HEAVY and not i.local]
    free = ("qcompile.codegen.templates.", "qcompile.integrations.")
    assert {i.importer for i in loading if not i.importer.startswith(free)} == set()
    integrations = [i for i in imports() if i.target.startswith("qcompile.integrations.") and not i.local]
    assert not [str(i) for i in integrations if not i.importer.startswith("qcompile.integrations.")]
    templates = [i for i in imports() if i.target.startswith("qcompile.codegen.templates.")]
    assert not [str(i) for i in templates if not i.importer.startswith("qcompile.codegen.templates.")]


def listed_packages() -> list[str]:
    """`tool.setuptools.packages` of pyproject.toml, without a TOML parser, which Python 3.10 lacks."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[tool.setuptools]\n")[1]
    return ast.literal_eval(section.split("packages = ")[1].split("]")[0] + "]")


def data_folders() -> Iterator[tuple[str, Path]]:
    """Folders of files that are no modules: setuptools counts them as packages, and warns of those it was not told."""
    for root, top in FOLDERS.items():
        for path in top.rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                yield ".".join((root, *path.relative_to(top).parts[:-1])), path.parent


def test_every_folder_is_a_listed_package():
    folders = {
        module if path.name == "__init__.py" else module.rpartition(".")[0]: path.parent
        for module, path in sources().items()
    }
    data = {module: folder for module, folder in data_folders() if module not in folders}
    assert sorted([*folders, *data]) == listed_packages()
    assert [str(folder) for folder in folders.values() if not (folder / "__init__.py").is_file()] == []


def test_links_show_the_folders_at_the_top():
    for link in LINKS:
        assert link.is_symlink()
        assert link.resolve() == FOLDERS[f"qcompile.{link.name}"]
