"""The house: a module imports only from floors below its own, read from the source without importing it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

LLMX = Path(__file__).parents[1] / "llmx"
ROOMS = {  # first name below llmx -> floor; inside one room imports are free
    "protocol": 0,
    "errors": 0,
    "config": 1,
    "display": 1,
    "parts": 1,
    "mixers": 2,
    "feedforward": 2,
    "runs": 2,
    "blocks": 3,
    "data": 3,  # and only what DATA_MAY_IMPORT says
    "tasks": 3,
    "networks": 4,
    "generation": 5,
    "audits": 5,
    "costs": 5,
    "training": 6,
    "exchange": 6,
    "comparison": 7,
    "sweep": 8,
    "probe": 8,
    "ladder": 8,
    "play": 8,
    "cli": 9,
}
DATA_MAY_IMPORT = ("llmx.data", "llmx.errors", "llmx.protocol", "llmx.runs.archive")
LIGHTNING = ("llmx.training", "llmx.data.datamodule", "llmx.sweep.callback", "llmx.cli")  # where it may appear
MODULES = {
    ".".join(path.relative_to(LLMX.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(LLMX.rglob("*.py"))
}


def imports(source: str, package: str) -> Iterator[str]:
    """The dotted names that a module imports, wherever in it: `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(module: str) -> list[str]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return list(imports(path.read_text(encoding="utf-8"), package))


def below(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_the_walk_finds_the_modules_and_reads_every_form_of_import():
    assert "llmx.protocol" in MODULES
    assert "llmx.mixers.attention" in MODULES
    source = (
        "import a.b\nfrom c import d as e\nfrom . import f\nfrom .g import h\nfrom ..i import j\ndef k():\n import m"
    )
    assert list(imports(source, "x.y")) == ["a.b", "c.d", "x.y.f", "x.y.g.h", "x.i.j", "m"]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "llmx"])
def test_a_module_imports_only_from_floors_below_its_own(module: str):
    room = module.split(".")[1]
    for name in imports_of(module):
        other = name.split(".")[1] if name.startswith("llmx.") else ""
        if other in ROOMS:
            assert ROOMS[other] < ROOMS[room] or other == room, f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in MODULES if below(name, ("llmx.mixers",))])
def test_mixers_never_import_each_other(module: str):
    assert [name for name in imports_of(module) if below(name, ("llmx.mixers",))] == []


@pytest.mark.parametrize("module", [name for name in MODULES if below(name, ("llmx.data",))])
def test_data_imports_nothing_else_of_llmx(module: str):
    ours = [name for name in imports_of(module) if below(name, ("llmx",))]
    assert [name for name in ours if not below(name, DATA_MAY_IMPORT)] == []


@pytest.mark.parametrize("module", MODULES)
def test_lightning_appears_where_runs_are_made_only(module: str):
    if not below(module, LIGHTNING):
        lightning = [name for name in imports_of(module) if below(name, ("lightning", "pytorch_lightning"))]
        assert lightning == []
