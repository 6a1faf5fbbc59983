"""The house rules that a reader of docs/architecture.md may rely on."""

import ast
import re
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "llava_fa"
MAP = Path(__file__).parent.parent / "docs" / "architecture.md"
ORDER = ("maths", "kernels", "solver", "nn", "data", "hub", "vllm", "train", "world", "eval", "cluster")
ORDER += ("serve", "web", "cli")
TOP = {
    "bounds",
    "config",
    "errors",
    "gpu",
    "native",
    "triton_search",
    "triton_search_kernels",
    "triton_trellis_kernels",
}
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


def story(tree: str) -> list[str]:
    """Files of the map in docs/architecture.md, top to bottom, each with its folders.

    A line has names, then what they are; two spaces of indentation are a folder deeper. What is not indented is the
    folder that all is in, first, and what stands beside it.
    """
    files, folders = [], []
    for line in tree.strip().split("\n")[1:]:
        if not line.startswith(" "):
            break
        names = re.match(r"\s*((?:[\w.]+(?:\.\w+|/)(?:\s+|$))*)", line)[1].split()
        depth = (len(line) - len(line.lstrip())) // 2
        for name in names:
            folders = folders[: depth - 1]
            if name.endswith("/"):
                folders.append(name.removesuffix("/"))
            else:
                files.append("/".join([*folders, name]))
    return files


def test_the_map_is_read_as_a_person_would():
    tree = """src/llava_fa/
  errors.py          the one exception
  native.py  csrc/   the compiled kernels: kernels.py is not here
  maths/             functions
    dft.py  polar.py   two
    deep/            more
      inner.py
  nn/                modules
    layer.py
tests/               beside it:
                     helpers.py"""
    names = ["errors.py", "native.py", "maths/dft.py", "maths/polar.py", "maths/deep/inner.py", "nn/layer.py"]
    assert story(tree) == names


STORY = story(MAP.read_text().split("```")[1])


def test_every_file_has_its_place_on_the_map():
    files = {str(path.relative_to(SRC)) for path in FILES if path.name != "__init__.py" or path.parent == SRC}
    on_map = {name for name in STORY if name.endswith(".py")}
    assert files - on_map == set(), "not on the map of docs/architecture.md"
    assert on_map - files == set(), "on the map, but not there"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_a_file_imports_only_what_the_map_has_above_it(path):
    """Within a folder too, so that no two files import each other, however far around."""
    here = str(path.relative_to(SRC))
    if path.name == "__init__.py":  # what a folder offers, of all its files
        return
    targets = {name.removeprefix("llava_fa.").replace(".", "/") + ".py" for name in imported(path)} & set(STORY)
    same = {name for name in targets if Path(name).parts[0] == Path(here).parts[0] or "/" not in name}
    below = {name for name in same if STORY.index(name) >= STORY.index(here)}
    assert not below, f"{here} imports {below}, which the map has below it"


def test_every_folder_has_its_place_in_the_order():
    folders = {path.name for path in SRC.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_a_file_and_its_functions_fit_in_one_reading(path):
    """Lines of a file, and of a function's body, signature and docstring aside."""
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{node.name} has a body of {lines} lines"


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
                trusted = [ast.unparse(word.value) for word in node.keywords if word.arg == "trust_remote_code"]
                assert trusted in ([], ["False"]), path
                if re.fullmatch(r"(.*\.)?Auto\w+\.from_pretrained", ast.unparse(node.func)):
                    assert trusted, f"{path}: transformers asks whether to run what is in the folder unless it is told"
                if isinstance(node.func, ast.Name):
                    assert node.func.id not in ("eval", "exec"), path
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"pickle", "cloudpickle", "dill"}, path


def test_ray_is_imported_by_its_folder_alone():
    """So that nobody has it, or waits for it, who has not asked for it."""
    for path in FILES:
        if path.relative_to(SRC).parts[0] != "cluster":
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert "ray" not in {name.split(".")[0] for name in names}, path
