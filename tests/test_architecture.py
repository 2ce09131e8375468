"""Rules about the code as a whole that neither ruff nor import-linter can state."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ktrain"

MAX_CLASS_LINES = 300
MAX_PUBLIC_METHODS = 15
MAX_TEST_FILE_LINES = 500
BANNED_NAME = re.compile(r"(Manager|Helper|Utils?)$|^(manager|helpers?|utils?)$|_(manager|helpers?|utils?)$")
HEAVY = ("ray", "kubernetes", "rich", "pydantic", "matplotlib")


def sources(root: Path = PACKAGE) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)


def nodes(path: Path, *types: type[ast.AST]) -> Iterator[ast.AST]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, types):
            yield node


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"  # type: ignore[attr-defined]


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def modules_after(statement: str) -> set[str]:
    """Returns the top-level modules that a fresh interpreter holds after the statement."""
    program = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_class_in_package_is_not_too_large() -> None:
    found = []
    for path in sources():
        for node in nodes(path, ast.ClassDef):
            assert isinstance(node, ast.ClassDef)
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
            # A conformance suite's tests are no interface.
            num_public = sum(not method.name.startswith(("_", "test_")) for method in methods)
            if num_lines > MAX_CLASS_LINES or num_public > MAX_PUBLIC_METHODS:
                found.append(f"{where(path, node)} {node.name}: {num_lines} lines, {num_public} public methods")
    assert not found, "\n".join(found)


def test_name_in_package_says_what_it_is() -> None:
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        f"{where(path, node)} {node.name}"  # type: ignore[attr-defined]
        for path in sources()
        for node in nodes(path, *definitions)
        if BANNED_NAME.search(node.name)  # type: ignore[attr-defined]
    ]
    found += [str(path.relative_to(ROOT)) for path in sources() if BANNED_NAME.search(path.stem)]
    assert not found, "\n".join(found)


def test_tier_never_asks_a_store_whether_something_exists() -> None:
    # Not found, forbidden and unreachable are three answers; exists() makes two of them one.
    found = [
        where(path, node)
        for path in sources(PACKAGE / "tier")
        for node in nodes(path, ast.Attribute)
        if node.attr in ("exists", "isfile", "isdir", "lexists")  # type: ignore[attr-defined]
    ]
    assert not found, "\n".join(found)


def test_native_module_is_imported_by_its_facade_alone() -> None:
    found = [
        where(path, node)
        for path in sources()
        if path != PACKAGE / "native.py"
        for node in nodes(path, ast.Import, ast.ImportFrom)
        if "ktrain._native" in imported_names(node)
    ]
    assert not found, "\n".join(found)


def test_print_is_called_in_cli_alone() -> None:
    found = [
        where(path, node)
        for path in sources()
        if "cli" not in path.relative_to(PACKAGE).parts
        for node in nodes(path, ast.Call)
        if isinstance(node.func, ast.Name) and node.func.id == "print"  # type: ignore[attr-defined]
    ]
    assert not found, "\n".join(found)


def test_ray_is_named_in_replicate_alone_even_inside_functions() -> None:
    found = [
        where(path, node)
        for path in sources()
        if "replicate" not in path.relative_to(PACKAGE).parts
        for node in nodes(path, ast.Import, ast.ImportFrom)
        if any(name == "ray" or name.startswith("ray.") for name in imported_names(node))
    ]
    assert not found, "\n".join(found)


def test_source_of_the_project_is_ascii() -> None:
    suffixes = {".py", ".pyi", ".cpp", ".h"}
    found = [
        str(path.relative_to(ROOT))
        for folder in ("ktrain", "native", "tests", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and not path.read_bytes().isascii()
    ]
    assert not found, "\n".join(found)


def test_file_of_tests_is_not_too_long() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in sources(ROOT / "tests")}
    found = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > MAX_TEST_FILE_LINES]
    assert not found, "\n".join(found)


def test_import_of_ktrain_loads_nothing_heavy() -> None:
    assert modules_after("import ktrain").isdisjoint({*HEAVY, "torch", "numpy", "fsspec"})


def test_import_of_native_loads_neither_torch_nor_numpy() -> None:
    # The agent lives beside the trainer and pays for every module a second time.
    assert modules_after("import ktrain.native").isdisjoint({*HEAVY, "torch", "numpy", "fsspec"})


@pytest.mark.parametrize("module", ["ktrain.cli", "ktrain.cli.main", "ktrain.launcher", "ktrain.jobs.start"])
def test_import_of_command_line_or_launcher_loads_neither_torch_nor_ray(module: str) -> None:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    if not path.is_dir() and not path.with_suffix(".py").is_file():
        pytest.skip(f"{module} is not written yet")
    assert modules_after(f"import {module}").isdisjoint({"torch", "ray", "kubernetes", "pydantic", "matplotlib"})


def test_launcher_in_python_loads_nothing_heavy_before_it_is_used() -> None:
    used = "import ktrain; ktrain.launch, ktrain.attach, ktrain.Job, ktrain.Kubernetes(), ktrain.Local(nodes=2)"
    assert modules_after(used).isdisjoint({*HEAVY, "torch", "numpy", "fsspec", "cloudpickle", "IPython"})
