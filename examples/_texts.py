"""Two texts out of the sources of Python's standard library: its code, and the prose within it."""

import ast
from collections.abc import Iterator
import warnings

Documents = list[tuple[str, str]]  # (name, text) of each

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_and_prose(sources: Documents) -> tuple[Documents, Documents]:
    """Takes Python sources apart: the code without documentation strings, and those strings.

    The two have no line in common, so that who has learned the one has not seen the other. Files
    of other versions of Python are left out.

    Args:
      sources: (name, text) of Python files.
    """
    code, prose = [], []
    for name, text in sources:
        try:
            with warnings.catch_warnings(action="ignore"):  # of old escapes in the sources
                found = list(_documentation(ast.parse(text)))
        except SyntaxError:
            continue
        lines = text.splitlines(keepends=True)
        for node, _ in found:
            # A statement of its own on its lines, as all but a few are.
            rows = slice(node.lineno - 1, node.end_lineno)
            lines[rows] = [""] * len(lines[rows])
        code.append((name, "".join(lines)))
        if found:
            prose.append((name, "\n\n".join(written for _, written in found) + "\n"))
    return code, prose


def _documentation(tree: ast.Module) -> Iterator[tuple[ast.Expr, str]]:
    """Yields the documentation strings, as they stand in the tree and as they read."""
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (written := ast.get_docstring(node)):
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            yield first, written
