"""The house rules that a reader of docs/architecture.md may rely on."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "llava_fa"
ORDER = ("maths", "kernels", "solver", "nn", "hub", "train", "world", "eval", "serve", "web", "cli")
TOP = {"config", "errors", "native"}
FILES = sorted(SRC.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module of this package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("llava_fa.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_run_one_way(path):
    folder = path.relative_to(SRC).parts[0]
    parts = {name.split(".")[1] for name in imported(path)}
    if folder in ORDER:
        later = set(ORDER[ORDER.index(folder) + 1 :])
        assert not parts & later, f"{folder} imports from {parts & later}, which come after it"
    elif folder.removesuffix(".py") in TOP:
        assert parts <= TOP


def test_every_folder_has_its_place_in_the_order():
    folders = {path.name for path in SRC.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_a_file_fits_in_one_reading(path):
    assert len(path.read_text().splitlines()) <= 450


def test_maths_knows_torch_and_nothing_else():
    allowed = {"torch", "math", "functools", "dataclasses", "collections", "typing", "__future__", "llava_fa"}
    for path in (SRC / "maths").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_nothing_dangerous_is_called():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                for keyword in node.keywords:
                    assert keyword.arg != "trust_remote_code", path
                if isinstance(node.func, ast.Name):
                    assert node.func.id not in ("eval", "exec"), path
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"pickle", "cloudpickle", "dill"}, path
