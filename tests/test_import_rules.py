"""Who may import whom: the table of the package's layers, held by reading the imports of every file.

Imports inside functions count like those on top; imports under `if TYPE_CHECKING` do not run and do not count for
cycles, but a door is a door for types as well.
"""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Iterator

import pytest
from places import ROOT, TESTS

from megatron_npd import roles

PACKAGE = "megatron_npd"
PACKAGE_FOLDER = ROOT / PACKAGE

LEVELS = [
    (
        "__init__",
        "cache",
        "errors",
        "schema",
        "roles",
        "files",
        "safetensors_format",
        "run_directory",
        "config",
        "hardware",
        "models",
    ),
    ("process",),
    ("data", "selection", "distributed", "versions"),
    ("buffer", "tasks"),
    ("kernels", "mcore", "vllm_engine", "weights"),
    ("training", "teacher", "rollout", "conversion", "estimates"),
    ("prepare",),
    ("supervise",),
    ("slurm", "report", "evaluate"),
    ("cli",),
]
"""Parts of the package from bottom to top. A part imports lower ones only; those of level 0 also each other."""

LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}

DOORS = {"megatron": "mcore", "transformer_engine": "mcore", "apex": "mcore", "vllm": "vllm_engine"}
"""Library -> the one part that may import it."""

WITHOUT_TORCH = ("config", "models", "process", "data", "buffer", "selection", "tasks", "versions", "roles", "files")

LOOSE = {"__init__", "cache", "cli", "errors", "schema", "roles", "files", "safetensors_format", "run_directory"}
"""Modules that lie beside the rooms, because every room may want them."""

COLLECTIVES = ("all_", "barrier", "broadcast", "gather", "reduce", "scatter", "send", "recv")
"""Beginnings of their names in torch.distributed."""

SPELLED_ELSEWHERE = {"roles.py", "config/run.py"}
"""Where a role's name may be spelled: its definition, and the names of configuration tables."""

TORCH_ALLOWED = {("process/metrics.py", "torch.utils.tensorboard")}
"""Lazily, where a scalar writer is wanted."""

Imports = list[tuple[str, bool]]
"""(absolute dotted name, whether it is imported when the module is)"""


@functools.cache
def imports_of(source: str) -> Imports:
    """Every name a file imports; `from a import b` gives a.b (b may be a module or a name in it)."""
    tree = ast.parse(source)
    top = {id(node) for statement in tree.body for node in _run_on_import(statement)}
    found: Imports = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


def violations(files: dict[str, str]) -> list[str]:
    """What breaks the rules in `files`: path below the package -> source."""
    broken = []
    for path, source in files.items():
        part = path.split("/")[0].removesuffix(".py")
        if part not in LEVEL:
            broken.append(f"{path}: {part} has no level; add it to LEVELS")
            continue
        for name, _ in imports_of(source):
            library, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if library == PACKAGE and target in LEVEL and not _may_import(part, target):
                broken.append(f"{path}: {part} must not import {target} ({name})")
            if DOORS.get(library, part) != part:
                broken.append(f"{path}: {library} is imported behind the door {DOORS[library]}/ only")
            if library == "torch" and part in WITHOUT_TORCH and not _torch_allowed(path, name):
                broken.append(f"{path}: {part} works without torch")
        # `python -O` takes asserts away, with all that happens in them.
        broken += [f"{path}: line {line}: {call} inside an assert" for line, call in effects_in_asserts(source)]
    return broken + [f"cycle: {' -> '.join(cycle)}" for cycle in cycles(files)]


EFFECTS = {"list", "next", "pop", "popleft", "append", "add", "remove", "send", "write", "wait"}
"""Calls that change something, or use up an iterator, which may be a collective of several ranks."""


def effects_in_asserts(source: str) -> list[tuple[int, str]]:
    """(line, name) of calls with effects in the tests of asserts."""
    tests = [node.test for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]
    calls = [node for test in tests for node in ast.walk(test) if isinstance(node, ast.Call)]
    named = [(call.lineno, getattr(call.func, "id", getattr(call.func, "attr", ""))) for call in calls]
    return [(line, name) for line, name in named if name in EFFECTS]


def cycles(files: dict[str, str]) -> list[list[str]]:
    """Circles of modules that import each other when they are imported."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in files}
    graph = {
        module: {
            target
            for name, at_import in imports_of(files[path])
            if at_import and (target := _module_of(name, modules)) and target != module
        }
        for module, path in modules.items()
    }
    found: list[list[str]] = []
    finished: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append([*trail[trail.index(module) :], module])
        elif module not in finished:
            for target in sorted(graph[module]):
                visit(target, [*trail, module])
            finished.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def _may_import(part: str, target: str) -> bool:
    if part == target:
        return True
    return LEVEL[target] < LEVEL[part] or LEVEL[part] == LEVEL[target] == 0


def _torch_allowed(path: str, name: str) -> bool:
    return any(path == file and name.startswith(module) for file, module in TORCH_ALLOWED)


def _module_of(name: str, modules: dict[str, str]) -> str | None:
    """The module of this package that an import of `name` loads."""
    if not name.startswith(f"{PACKAGE}."):
        return None
    local = name.removeprefix(f"{PACKAGE}.")
    return next((module for module in (local, local.rpartition(".")[0]) if module in modules), None)


def _run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not function bodies, not `if TYPE_CHECKING` blocks."""
    yield node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from _run_on_import(child)


@functools.cache
def package() -> dict[str, str]:
    """Every file of the package: path -> source."""
    return {path.relative_to(PACKAGE_FOLDER).as_posix(): path.read_text() for path in PACKAGE_FOLDER.rglob("*.py")}


def test_the_package_keeps_its_rules() -> None:
    assert len(package()) > 20
    assert violations(package()) == []


def test_no_module_lies_loose() -> None:
    assert {path.removesuffix(".py") for path in package() if "/" not in path} == LOOSE


def test_every_import_leads_somewhere() -> None:
    """A lazy import of what was moved would be found by whoever first comes by."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in package()}
    everywhere = [
        path for folder in (PACKAGE_FOLDER, TESTS, ROOT / "tools", ROOT / "examples") for path in folder.rglob("*.py")
    ]
    lost = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in everywhere
        for name, _ in imports_of(path.read_text())
        if name.startswith(f"{PACKAGE}.") and not _is_there(name.removeprefix(f"{PACKAGE}."), modules)
    ]
    assert len(everywhere) > 200 and lost == []


def test_a_name_stands_for_one_thing() -> None:
    """Of classes and of files; packages have an __init__.py each."""
    files = Counter(path.rpartition("/")[2] for path in package() if not path.endswith("__init__.py"))
    trees = [ast.parse(source) for source in package().values()]
    classes = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in (files + classes).items() if count > 1] == []


def test_collectives_are_called_in_one_place() -> None:
    """Megatron's own calls are behind its door; of ours, every group and device is chosen there."""
    called = [
        f"{path}:{node.lineno}: {node.attr}"
        for path, source in package().items()
        if path != "distributed/collectives.py"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id == "dist" and node.attr.startswith(COLLECTIVES)
    ]
    assert called == []


def test_role_names_are_spelled_once() -> None:
    names = {*roles.ROLES, roles.ROLLOUT_TEACHER, roles.SUPERVISOR}
    spelled = [
        f"{path}:{node.lineno}: {node.value}"
        for path, source in package().items()
        if path not in SPELLED_ELSEWHERE
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    ]
    assert spelled == []


def _is_there(name: str, modules: dict[str, str]) -> bool:
    """Whether a module, or a name at the top of one, exists."""
    module, _, member = name.rpartition(".")
    return name in modules or member in _tops(modules.get(module, "__init__.py" if not module else ""))


@functools.cache
def _tops(path: str) -> set[str]:
    """Names a module of the package has at its top."""
    found: set[str] = set()
    for node in ast.parse(package()[path]).body if path else ():
        for part in ast.walk(node) if isinstance(node, ast.If | ast.Try | ast.Assign | ast.AnnAssign) else (node,):
            if isinstance(part, ast.Import | ast.ImportFrom):
                found |= {(alias.asname or alias.name).split(".")[0] for alias in part.names}
            elif isinstance(part, ast.Name):
                found.add(part.id)
            elif isinstance(part, ast.FunctionDef | ast.ClassDef):
                found.add(part.name)
    return found


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("buffer/work.py", "from megatron_npd.training import trainer", "buffer must not import training"),
        ("data/packing.py", "import megatron_npd.buffer.plan", "data must not import buffer"),
        (
            "teacher/a.py",
            "def f():\n    from megatron_npd.rollout.sidecar import E",
            "teacher must not import rollout",
        ),
        ("training/a.py", "from megatron_npd import cli", "training must not import cli"),
        ("training/a.py", "def f():\n    from megatron.core import parallel_state", "behind the door mcore/"),
        ("weights/a.py", "import vllm", "behind the door vllm_engine/"),
        ("rollout/a.py", "import transformer_engine.pytorch as te", "behind the door mcore/"),
        ("kernels/a.py", "from apex.optimizers import FusedAdam", "behind the door mcore/"),
        ("data/a.py", "import torch", "data works without torch"),
        ("process/metrics.py", "import torch.nn", "process works without torch"),
        ("newcomer/a.py", "", "no level"),
        ("weights/a.py", "assert not list(shards), 'none'", "list inside an assert"),
        ("weights/a.py", "def f(x):\n    assert x.pop() == 1", "line 2: pop inside an assert"),
    ],
)
def test_the_checker_catches(path: str, source: str, complaint: str) -> None:
    assert any(complaint in violation for violation in violations({path: source}))


def test_the_checker_catches_a_cycle_but_not_a_lazy_one() -> None:
    there = {"buffer/a.py": "from megatron_npd.buffer.b import f"}
    assert violations({**there, "buffer/b.py": "from megatron_npd.buffer import a"}) == [
        "cycle: buffer.a -> buffer.b -> buffer.a"
    ]
    assert violations({**there, "buffer/b.py": "def g():\n    from megatron_npd.buffer import a"}) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("training/a.py", "from megatron_npd.mcore.model import build_gpt"),
        ("process/metrics.py", "def f():\n    from torch.utils.tensorboard import SummaryWriter"),
        ("mcore/a.py", "import megatron.core"),
        ("models/hf_config.py", "from megatron_npd.errors import UserError"),
    ],
)
def test_the_checker_lets_pass(path: str, source: str) -> None:
    assert violations({path: source}) == []
