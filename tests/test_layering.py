"""Imports point one way only: pallas_kernels <- jfp8 <- train."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "pallas_kernels": {"pallas_kernels"},
    "jfp8": {"jfp8", "pallas_kernels"},
    "train": {"train", "jfp8", "pallas_kernels"},
}
FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def test_finds_both_forms_of_import():
    source = "import jfp8.nnx as n\ndef f():\n    from train.config import parse\n"
    assert imported_packages(source) == {"jfp8", "train"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    local = imported_packages(path.read_text()) & set(MAY_IMPORT)
    assert local <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_utils_and_no_file_over_500_lines(path):
    assert path.name not in ("utils.py", "helpers.py", "misc.py")
    assert len(path.read_text().splitlines()) <= 500
