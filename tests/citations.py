"""Finds what comments, docstrings and docs cite, and what of it does not exist (`tests/test_citations.py`).

What is looked at: docstrings and comments of Python, comments of C++, and Markdown. What counts as a citation:

- a page of docs/ (``docs/format.md``, ``format.md``), and with it a heading: ``docs/format.md, "Packed codes"``;
- a file: one in backticks, or a path that begins with a folder of this repository;
- a dotted name in backticks whose first part is a module, a folder or a class of ours (``hub.allocation``,
  ``FourierError.at``), and in a docstring any single name in single backticks, which must stand somewhere in the code;
- a name said to be of a file (`` `fit` of csrc/linear.cpp ``), which must stand in it;
- a numbered fact, for there are none.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SUFFIXES = "py|cpp|h|inl|md"
EXTERNAL = {
    # files of the benchmarks' own evaluations and of llama.cpp
    "eval_gpt4.py",
    "eval_gpt_mmhal.py",
    "eval_gpt_obj_halbench.py",
    "evaluate.py",
    "calculation.py",
    "eval.py",
    "llava/eval/eval_science_qa.py",
    "ggml.h",
}
AMBIGUOUS = {"config", "model", "metrics", "answers", "report", "run"}
"""Modules of ours whose names are those of everyday variables too: only what resolves is ours."""

DATA = re.compile(rf"\.({SUFFIXES}|json|jsonl|txt|css|zip|tsv|partial)$")
PAGE = re.compile(r'(?<![\w/*.])(?:docs/)?(?P<page>[a-z_]+\.md)\b(?:(?:,|\'s| section|’s)* "(?P<section>[^"]+)")?')
FILE = re.compile(rf"(?<![\w/*.<])(?P<path>[A-Za-z_][\w./-]*\.(?:{SUFFIXES}))\b(?![\w*])")
DOTTED = re.compile(r"(?<!`)`(?P<name>[A-Za-z_]\w*(?:\.\w+)+)(?:\(\))?`(?!`)")
SINGLE = re.compile(r"(?<!`)`(?P<name>[A-Za-z_]\w*)(?:\(\))?`(?!`)")
OF_FILE = re.compile(rf"`(?P<name>[A-Za-z_]\w*)(?:\(\))?` of `?(?P<path>[A-Za-z_][\w./-]*\.(?:{SUFFIXES}))\b")
FACT = re.compile(r"\bfact\s+\d+\b")


class Block(NamedTuple):
    """A piece of prose: a docstring, a run of comment lines, a Markdown file's line."""

    line: int
    text: str


class Repository:
    """What there is to cite."""

    def __init__(self, root: Path) -> None:
        self.root = root
        folders = [root / name for name in ("src", "benchmarks", "tests", "docs")]
        self.files = sorted(p for folder in folders for p in folder.rglob("*") if p.is_file())
        self.files += sorted(p for p in root.iterdir() if p.is_file())
        self.paths = {f"/{path.relative_to(root).as_posix()}" for path in self.files}
        self.headings = {path.name: _headings(path) for path in self.files if path.suffix == ".md"}
        self.names: set[str] = set()  # every identifier of the code
        for path in self.files:
            if path.suffix == ".py":
                self.names.add(path.stem)
        self.modules: dict[str, dict[str, set[str]]] = {}  # dotted module → its names → theirs
        for path in self.files:
            if path.suffix == ".py":
                tree = ast.parse(path.read_text())
                self.names |= _identifiers(tree)
                self.modules[_module(path.relative_to(root))] = _members(tree)
            elif path.suffix in (".cpp", ".h", ".inl"):
                self.names |= set(re.findall(r"\b[A-Za-z_]\w*\b", path.read_text()))
        self.classes = {name for members in self.modules.values() for name in members if name.lstrip("_")[:1].isupper()}
        parts = {part for module in self.modules if not module.startswith("tests") for part in module.split(".")}
        self.ours = parts | self.classes

    def has_file(self, path: str) -> bool:
        """Whether a file's path is, or ends in, this one."""
        return path in EXTERNAL or bool(self.files_of(path))

    def files_of(self, path: str) -> list[str]:
        """The paths that are, or end in, this one."""
        return [known for known in self.paths if known.endswith(f"/{path}")]

    def has_heading(self, page: str, section: str) -> bool:
        """Whether a page has a heading that begins with these words."""
        return any(_plain(heading).startswith(_plain(section)) for heading in self.headings.get(page, ()))

    def has_name(self, name: str) -> bool:
        """Whether a dotted name leads from a module, folder or class of ours to something that it has."""
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            head, rest = ".".join(parts[:cut]), parts[cut:]
            for module, members in self.modules.items():
                folder = f".{head}." in f".{module}"  # a package, whose __init__ has the dotted name of the folder
                if not rest and (folder or f".{module}".endswith(f".{head}")):
                    return True
                if f".{module}".endswith(f".{head}") and _leads(members, rest):
                    return True
        return any(_leads(members, parts) for members in self.modules.values())


def _leads(members: dict[str, set[str]], parts: list[str]) -> bool:
    if not parts or parts[0] not in members:
        return False
    return len(parts) == 1 or parts[1] in members[parts[0]] or not members[parts[0]]


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    parts = parts[1:] if parts[0] == "src" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _headings(path: Path) -> list[str]:
    return [line.lstrip("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]


def _plain(text: str) -> str:
    return " ".join(text.replace("`", "").split())


def _identifiers(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                names |= set(value.split("."))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names.add(node.value)
    return names


def _members(tree: ast.Module) -> dict[str, set[str]]:
    """Top-level names; of classes (of this file) with the names that they and their instances have."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            own = {n for child in ast.walk(node) for n in _bound(child)}
            found[node.name] = own | {base.id for base in node.bases if isinstance(base, ast.Name)}
    for node in ast.walk(tree):
        if node in tree.body or isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in _bound(node):
                found.setdefault(name, set())
    for own in found.values():
        for base in list(own):
            own |= found.get(base, set())
    return found


def _bound(node: ast.AST) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name for alias in node.names}
    targets = [*getattr(node, "targets", [])] + ([node.target] if isinstance(node, ast.AnnAssign) else [])
    names = set()
    for target in targets:
        for part in ast.walk(target):
            if isinstance(part, ast.Name):
                names.add(part.id)
            elif isinstance(part, ast.Attribute):
                names.add(part.attr)
    return names


def blocks(path: Path) -> Iterator[Block]:
    """The prose of a file."""
    text = path.read_text()
    if path.suffix == ".py":
        yield from _docstrings(text)
        yield from _runs(_python_comments(text))
    elif path.suffix == ".md":
        yield from _runs(enumerate(text.splitlines(), 1))
    else:
        yield from _runs((n, line.split("//", 1)[1]) for n, line in enumerate(text.splitlines(), 1) if "//" in line)


def _docstrings(text: str) -> Iterator[Block]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield Block(node.lineno, node.value.value)


def _python_comments(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")


def _runs(lines: Iterator[tuple[int, str]]) -> Iterator[Block]:
    """Neighbouring lines as one block, for a citation may be broken at a line's end; blank lines part blocks."""
    run: list[tuple[int, str]] = []
    for number, line in lines:
        if run and (number != run[-1][0] + 1 or not line.strip()):
            yield Block(run[0][0], "\n".join(text for _, text in run))
            run = []
        if line.strip():
            run.append((number, line))
    if run:
        yield Block(run[0][0], "\n".join(text for _, text in run))


def broken(path: Path, repository: Repository) -> Iterator[str]:
    """What this file cites in vain: ``file:line: citation: what is wrong``."""
    python = path.suffix == ".py"
    for block in blocks(path):
        for at, citation, problem in _problems(block.text, repository, docstring=python):
            line = block.line + block.text.count("\n", 0, at)
            yield f"{path.relative_to(repository.root)}:{line}: {citation}: {problem}"


def _problems(text: str, repository: Repository, *, docstring: bool) -> Iterator[tuple[int, str, str]]:
    # a URL is somebody else's; a line end inside a citation is a space
    text = re.sub(r"https?://\S+", lambda url: " " * len(url[0]), text)
    flat = re.sub(r"\n\s*", lambda gap: " " + "\x00" * (len(gap[0]) - 1), text)
    for match in FACT.finditer(text):
        yield match.start(), " ".join(match[0].split()), "no page numbers its facts"
    for match in OF_FILE.finditer(text):
        files = repository.files_of(match["path"])
        if files and not any(match["name"] in (repository.root / file[1:]).read_text() for file in files):
            yield match.start(), f"`{match['name']}` of {match['path']}", "it does not stand there"
    for match in PAGE.finditer(flat):
        page, section = match["page"], (match["section"] or "").replace("\x00", "")
        if page not in repository.headings:
            yield match.start(), page, "there is no such page"
        elif section and not repository.has_heading(page, section):
            yield match.start(), f'{page}, "{section}"', "the page has no such heading"
    for match in FILE.finditer(text):
        page = match["path"].endswith(".md") and match["path"].removeprefix("docs/").count("/") == 0
        if not page and not repository.has_file(match["path"]):
            yield match.start(), match["path"], "there is no such file"
    for match in DOTTED.finditer(text):
        name = match["name"]
        ours = name.split(".")[0] in repository.ours - AMBIGUOUS
        if ours and not DATA.search(name) and not repository.has_name(name):
            yield match.start(), f"`{name}`", "there is nothing of that name"
    for match in SINGLE.finditer(text) if docstring else ():
        if match["name"] not in repository.names:
            yield match.start(), f"`{match['name']}`", "the code has no such name"
