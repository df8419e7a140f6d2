"""The rooms of the package: allowed imports, and private names."""

import ast
import logging
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "metakern"
SOURCES = sorted(PACKAGE.rglob("*.py"))

#: Imports within functions that are there for time: matplotlib and the command line take a second to import.
DEFERRED = {
    ("metakern.__main__", "metakern.core.requirements"),
    ("metakern.__main__", "metakern.cli"),
    ("metakern.cli.maml", "metakern.runs.figures"),
    ("metakern.cli.optimizer", "metakern.runs.figures"),
    ("metakern.runs.metrics", "metakern.runs.figures"),
}


class Import(NamedTuple):
    """``from module import name`` or ``import module``, where ``name`` is empty."""

    line: int
    module: str
    name: str
    bound: str  # what it is called here
    deferred: bool  # within a function


def imports(tree: ast.AST) -> Iterator[Import]:
    """All imports of the package's own modules."""
    deferred = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        within = id(node) in deferred
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "metakern":
            for each in node.names:
                yield Import(node.lineno, node.module or "", each.name, each.asname or each.name, within)
        elif isinstance(node, ast.Import):
            for each in node.names:
                if each.name.partition(".")[0] == "metakern":
                    yield Import(node.lineno, each.name, "", each.asname or each.name, within)


#: The compiled libraries.
COMPILED = {"_C", "_autograd"}

#: Names that only look private: the compiled libraries, and what a namedtuple has for everyone.
PUBLIC = {*COMPILED, "_asdict", "_fields", "_make", "_replace"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def room(module: str) -> str:
    """The folder of a module; each operator and each folder within a room counts as the room's."""
    return ".".join(module.split(".")[:2])


def private_across_rooms(module: str, tree: ast.AST) -> list[str]:
    """Names with an underscore that a module takes from another room, by import or as an attribute."""
    found, modules = [], {}
    for each in imports(tree):
        target = f"{each.module}.{each.name}".rstrip(".")
        if room(target) == room(module):
            continue
        modules[each.bound] = target
        if any(map(is_private, target.split("."))):
            found.append(f"{module}:{each.line} imports {target}")
    found += [
        f"{module}:{node.lineno} uses {modules[ast.unparse(node.value)]}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in modules
    ]
    return found


def deferred_imports(module: str, tree: ast.AST) -> list[str]:
    """Imports of the package's own modules within functions, which may hide a circle."""
    return [
        f"{module}:{each.line} imports {each.module} within a function"
        for each in imports(tree)
        if each.deferred and (module, each.module) not in DEFERRED
    ]


def imports_of_the_package(module: str, tree: ast.AST) -> list[str]:
    """Imports of names that metakern/__init__.py has, which knows all rooms."""
    return [
        f"{module}:{each.line} imports {each.name or each.module} from metakern itself"
        for each in imports(tree)
        if each.module == "metakern"
        and each.name not in COMPILED
        and not (each.name and (PACKAGE / each.name).is_dir())
    ]


def private_names_of_torch(module: str, tree: ast.AST) -> list[str]:
    """Names of torch with an underscore, outside core/torch_private.py."""
    if module == "metakern.core.torch_private":
        return []
    bound, found = {"torch": "torch"}, []
    for node in ast.walk(tree):
        names = node.names if isinstance(node, ast.Import | ast.ImportFrom) else []
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for each in names:
            target = f"{prefix}{each.name}"
            if target.partition(".")[0] == "torch":
                bound[each.asname or each.name.partition(".")[0]] = target if prefix or each.asname else "torch"
                if any(map(is_private_of_torch, target.split("."))):
                    found.append(f"{module}:{node.lineno} imports {target}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private_of_torch(node.attr):
            owner = ast.unparse(node.value)
            if owner.partition(".")[0] in bound and re.fullmatch(r"[\w.]+", owner):
                found.append(f"{module}:{node.lineno} uses {owner}.{node.attr}")
    return found


def order() -> dict[str, int]:
    """The rooms, from the lowest, as pyproject.toml has them."""
    contracts = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    return {f"metakern.{name}": level for level, line in enumerate(reversed(layers)) for name in line.split(" | ")}


def imports_from_above(module: str, tree: ast.AST) -> list[str]:
    """Imports from a room above, or beside; those for annotations alone, which import-linter leaves out, too."""
    levels = order()
    return [
        f"{module}:{each.line} imports {each.module}, which stands above"
        for each in imports(tree)
        if room(each.module) != room(module)
        and room(module) in levels
        and levels.get(room(each.module), -1) >= levels[room(module)]
    ]


def is_private_of_torch(name: str) -> bool:
    return is_private(name) or name == "_C"


RULES = [private_across_rooms, private_names_of_torch, imports_from_above, deferred_imports, imports_of_the_package]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("rule", RULES)
def test_rooms_keep_to_themselves(rule):
    found = [line for path in SOURCES if name_of(path) != "metakern" for line in rule(name_of(path), parsed(path))]
    assert found == []


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (private_across_rooms, "from metakern.ops.core.devices import _name"),
        (private_across_rooms, "from metakern.ops._devices import name"),
        (private_across_rooms, "from metakern.ops import devices as d\nd._name()"),
        (private_across_rooms, "import metakern.ops.core\nmetakern.ops.core._name"),
        (private_names_of_torch, "import torch\ntorch._foreach_add"),
        (private_names_of_torch, "import torch\ntorch._C"),
        (private_names_of_torch, "import torch.nn.functional as F\nF._verify_batch_size"),
        (private_names_of_torch, "from torch.utils import _pytree"),
        (private_names_of_torch, "from torch.autograd import forward_ad\nforward_ad._current_level"),
        (imports_from_above, "if TYPE_CHECKING:\n    from metakern.maml.batched import Adapted"),
        (deferred_imports, "def f():\n    from metakern.rules import lstm"),
        (deferred_imports, "class A:\n    def f(self):\n        import metakern.core.memo"),
        (imports_of_the_package, "from metakern import adapt"),
        (imports_of_the_package, "import metakern"),
    ],
)
def test_the_rules_find_what_breaks_them(rule, code):
    (line,) = rule("metakern.rules.mine", ast.parse(code))
    assert line.startswith("metakern.rules.mine:")


def test_the_rules_let_pass_what_is_allowed():
    code = """
from metakern import _C, rules
from metakern.core.version import __version__
from metakern.rules import _helper
from metakern.rules import lstm
lstm._helper()
def f():
    import torch
"""
    assert [line for rule in RULES for line in rule("metakern.rules.mine", ast.parse(code))] == []


def test_imports_run_one_way(monkeypatch):
    """The contracts in pyproject.toml, which ``make lint`` checks too."""
    pytest.importorskip("importlinter", reason="import-linter is not installed: pip install 'metakern[lint]'")
    from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

    monkeypatch.chdir(PACKAGE.parent)
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    disabled = [logger.disabled for logger in loggers]
    try:
        assert lint_imports(no_cache=True) == EXIT_STATUS_SUCCESS
    finally:  # it configures logging anew, which would silence the package's logger in later tests
        for logger, was in zip(loggers, disabled, strict=True):
            logger.disabled = was
