"""The house: a module imports only from floors below its own, read from the source without importing it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

LLMX = Path(__file__).parents[1] / "llmx"
ROOMS = {  # first name below llmx -> (floor, room); inside one room imports are free
    "shapes": (0, "ground"),
    "errors": (0, "ground"),
    "yaml_files": (0, "ground"),
    "base_config": (0, "ground"),
    "archives": (0, "ground"),
    "protocol": (0, "ground"),
    "composition": (0, "ground"),
    "parts": (1, "parts"),
    "mixers": (2, "mixers"),
    "feedforward": (2, "feedforward"),
    "blocks": (3, "blocks"),
    "networks": (4, "networks"),
    "generation": (5, "generation"),
    "describe": (5, "describe"),
    "audits": (5, "audits"),
    "data": (5, "data"),  # beside the house: see DATA_MAY_IMPORT
    "training": (6, "training"),
    "reports": (6, "reports"),
    "comparison": (7, "comparison"),
    "cli": (7, "top"),
    "arguments": (7, "top"),
    "failures": (7, "top"),
    "trying": (7, "top"),
    "explain": (7, "top"),
    "matching": (7, "top"),
    "budget": (7, "top"),
    "sweep": (8, "sweep"),
}
DATA_MAY_IMPORT = ("llmx.data", "llmx.archives", "llmx.errors", "llmx.protocol")
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
    floor, room = ROOMS[module.split(".")[1]]
    for name in imports_of(module):
        if name.startswith("llmx.") and name.split(".")[1] in ROOMS:
            other_floor, other_room = ROOMS[name.split(".")[1]]
            assert other_floor < floor or other_room == room, f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in MODULES if below(name, ("llmx.mixers",))])
def test_mixers_never_import_each_other(module: str):
    assert [name for name in imports_of(module) if below(name, ("llmx.mixers",))] == []


@pytest.mark.parametrize("module", [name for name in MODULES if below(name, ("llmx.data",))])
def test_data_imports_nothing_else_of_llmx(module: str):
    ours = [name for name in imports_of(module) if below(name, ("llmx",))]
    assert [name for name in ours if not below(name, DATA_MAY_IMPORT)] == []


@pytest.mark.parametrize("module", MODULES)
def test_lightning_appears_in_training_datamodule_and_cli_only(module: str):
    if not below(module, ("llmx.training", "llmx.data.datamodule", "llmx.cli")):
        lightning = [name for name in imports_of(module) if below(name, ("lightning", "pytorch_lightning"))]
        assert lightning == []
