"""The two lists of public names: what type checkers read, and what is imported when it is first used."""

import ast
from pathlib import Path

import batchnorm


def test_type_checkers_and_imports_find_the_same_names_in_the_same_places() -> None:
    tree = ast.parse(Path(batchnorm.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module != "batchnorm"
        for alias in node.names
    }
    assert seen == batchnorm._HOME


def test_every_public_name_is_there() -> None:
    assert all(hasattr(batchnorm, name) for name in batchnorm.__all__)
