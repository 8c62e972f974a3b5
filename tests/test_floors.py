"""The house: a module imports only from floors below its own, read from the source without importing it."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

LLMX = Path(__file__).parents[1] / "llmx"
ROOMS = {  # first name below llmx -> floor; inside one room imports are free but for circles
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


def test_no_modules_import_each_other_in_a_circle_not_even_for_a_type():
    graph = {
        module: {other for name in imports_of(module) for other in (name, name.rpartition(".")[0]) if other in MODULES}
        for module in MODULES
        if MODULES[module].name != "__init__.py"
    }
    sorter = graphlib.TopologicalSorter({module: others & graph.keys() for module, others in graph.items()})
    assert set(sorter.static_order()) == graph.keys()  # it raises CycleError, with the circle, if there is one


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


# -------------------------------------------------------------------------------------------------------------- sizes
ROOT = LLMX.parent
LOOSE = {"__init__", "protocol", "errors", "generation", "display"}  # modules at the top of llmx/, each a floor


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("package", ["llmx", "benchmarks", "testbed"])
def test_no_module_has_more_than_350_lines(package: str):
    sizes = {str(path.relative_to(ROOT)): lines(path) for path in (ROOT / package).rglob("*.py")}
    assert {name: size for name, size in sizes.items() if size > 350} == {}


def test_no_class_has_more_than_300_lines():
    nodes = [(m, node) for m, path in MODULES.items() for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    sizes = {f"{m}.{n.name}": n.end_lineno - n.lineno + 1 for m, n in nodes if isinstance(n, ast.ClassDef)}
    assert {name: size for name, size in sizes.items() if size > 300} == {}


def test_no_test_file_has_more_than_500_lines():
    sizes = {str(path.relative_to(ROOT)): lines(path) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: size for name, size in sizes.items() if size > 500} == {}


def test_at_most_20_lines_ignore_a_type():
    found = [
        f"{module}:{number}"
        for module, path in MODULES.items()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "type: ignore" in line
    ]
    assert len(found) <= 20, found


def test_only_floors_stand_alone_at_the_top():
    assert {path.stem for path in LLMX.glob("*.py")} - {"__main__"} == LOOSE


def test_tests_and_benchmarks_do_not_import_each_other():
    """They share testbed/. Only the tests of the benchmarks import them."""
    for package, others in (
        ("tests", ("benchmarks",)),
        ("benchmarks", ("tests",)),
        ("testbed", ("tests", "benchmarks")),
    ):
        for path in (ROOT / package).rglob("*.py"):
            place = path.relative_to(ROOT)
            if place.parts[:2] != ("tests", "benchmarks"):
                names = imports(path.read_text(encoding="utf-8"), ".".join(place.parent.parts))
                assert [name for name in names if below(name, others)] == [], place
