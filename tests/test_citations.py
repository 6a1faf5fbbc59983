"""What comments, docstrings and docs cite exists: pages and their sections, files, names of the code."""

from pathlib import Path

import pytest
from citations import Repository, broken

ROOT = Path(__file__).parent.parent
REPOSITORY = Repository(ROOT)
SUFFIXES = (".py", ".cpp", ".h", ".inl", ".md")
HISTORY = {"CHANGELOG.md"}  # it speaks of what is gone
FILES = [
    path
    for path in REPOSITORY.files
    if path.suffix in SUFFIXES and "tests" not in path.relative_to(ROOT).parts and path.name not in HISTORY
]


@pytest.mark.parametrize("folder", sorted({str(path.parent.relative_to(ROOT)) for path in FILES}))
def test_every_citation_resolves(folder):
    files = [path for path in FILES if str(path.parent.relative_to(ROOT)) == folder]
    problems = [problem for path in files for problem in broken(path, REPOSITORY)]
    assert not problems, "\n" + "\n".join(problems)


@pytest.fixture
def small(tmp_path):
    """A repository of one page, one module and one C++ file."""
    for name, text in {
        "docs/format.md": "# The format\n\n## Packed codes (2026)\n\nSee [method](method.md).\n",
        "docs/method.md": "# The method\n",
        "src/llava_fa/hub/allocation.py": "LIMIT = 1\n\n\ndef measure():\n    pass\n",
        "src/llava_fa/errors.py": "class FourierError(ValueError):\n    def at(self):\n        self.where = ''\n",
        "src/llava_fa/csrc/dft.cpp": "// codes as docs/format.md has them\nint llava_fa_dft();\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def problems_of(root, text, name="src/llava_fa/cited.py"):
    (root / name).write_text(text)
    return list(broken(root / name, Repository(root)))


@pytest.mark.parametrize(
    "text",
    [
        'docs/format.md, "Packed codes" and format.md, "The format"',
        'docs/format.md, "Packed\ncodes"',
        "csrc/dft.cpp, `dft.cpp`, `hub/allocation.py` and hub/allocation.py",
        "`hub.allocation`, `allocation.measure`, `llava_fa.hub.allocation.LIMIT`",
        "`FourierError.at`, `FourierError.where`, `llava_fa_dft` of csrc/dft.cpp",
        "`measure`, `LIMIT`, `llava_fa_dft`; ``measured`` is no citation, `torch.linalg.svd` not ours",
        "https://example.org/docs/other.md and ``eval_gpt4.py``",
    ],
)
def test_what_exists_is_no_problem(small, text):
    assert problems_of(small, f'"""{text}."""\n') == []
    assert problems_of(small, "".join(f"# {line}\n" for line in text.split("\n"))) == []


@pytest.mark.parametrize(
    ("text", "citation"),
    [
        ("see docs/formats.md", "formats.md: there is no such page"),
        ('see docs/format.md, "A layer"', 'format.md, "A layer": the page has no such heading'),
        ('see docs/format.md, "A\n    layer"', 'format.md, "A layer": the page has no such heading'),
        ("the kernels of csrc/linear.cpp", "csrc/linear.cpp: there is no such file"),
        ("as `allocation.measured` does", "`allocation.measured`: there is nothing of that name"),
        ("as `hub.sensitivity.chosen` does", "`hub.sensitivity.chosen`: there is nothing of that name"),
        ("`FourierError.after`", "`FourierError.after`: there is nothing of that name"),
        ("as `measures` does", "`measures`: the code has no such name"),
        ("`measure` of csrc/dft.cpp", "`measure` of csrc/dft.cpp: it does not stand there"),
        ("method.md fact 3", "fact 3: no page numbers its facts"),
    ],
)
def test_what_does_not_exist_is_found(small, text, citation):
    (problem,) = problems_of(small, f'"""Fine.\n\n    {text}\n"""\n')
    assert problem == f"src/llava_fa/cited.py:3: {citation}"


def test_comments_of_both_languages_and_pages_are_read(small):
    (problem,) = problems_of(small, "x = 1\ny = 2  # as docs/formats.md says\n")
    assert problem == "src/llava_fa/cited.py:2: formats.md: there is no such page"
    (problem,) = problems_of(small, "int a;\nint b;  // see simd.h\n", "src/llava_fa/csrc/other.cpp")
    assert problem == "src/llava_fa/csrc/other.cpp:2: simd.h: there is no such file"
    (problem,) = problems_of(small, "# A page\n\nThe code is in `hub/plans.py`.\n", "docs/page.md")
    assert problem == "docs/page.md:3: hub/plans.py: there is no such file"
