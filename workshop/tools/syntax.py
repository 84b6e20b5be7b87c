"""Reads Python files as syntax trees, without running them: which values a name can have where it is used."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path


@dataclasses.dataclass
class Module:
    """A parsed file: its tree, the strings it gives names to, and where it imports other names from."""

    file: str
    tree: ast.Module
    constants: dict[str, ast.expr]
    imports: dict[str, tuple[str, str]]
    parents: dict[ast.AST, ast.AST]


def read_all(root: Path, folders: Iterable[str]) -> Iterator[Module]:
    """The files in some folders of `root`, without examples."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            if "/examples/" not in file:
                yield _read(file, ast.parse(path.read_text(encoding="utf-8")))


def _read(file: str, tree: ast.Module) -> Module:
    constants: dict[str, ast.expr] = {}
    imports: dict[str, tuple[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = node.value
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple)
        ):
            for target, value in zip(node.targets[0].elts, node.value.elts, strict=False):
                if isinstance(target, ast.Name):
                    constants[target.id] = value
        elif isinstance(node, ast.ImportFrom) and node.level and node.module:
            folder = file.split("/")[: -node.level]
            source = "/".join([*folder, *node.module.split(".")]) + ".py"
            imports |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    return Module(file, tree, constants, imports, parents)


def function_of(node: ast.AST, module: Module) -> ast.FunctionDef | None:
    """The innermost function around a node."""
    return next((above for above in _ancestors(node, module) if isinstance(above, ast.FunctionDef)), None)


def values_of(function: ast.FunctionDef, name: ast.Name, module: Module) -> list[ast.expr] | None:
    """The values that a name of a function can have where it is used; None if the function gives it none."""
    found: list[tuple[ast.stmt, ast.expr]] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            found += [(node, value) for value in _values_for(name.id, node)]
        elif isinstance(node, ast.For | ast.comprehension | ast.NamedExpr) and name.id in _names(node.target):
            return [ast.Name(id="")]
    above = set(_ancestors(name, module))
    before = sorted((pair for pair in found if pair[0].lineno < name.lineno), key=lambda pair: -pair[0].lineno)
    values: list[ast.expr] = []
    for statement, value in before:
        values += (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,)
        if module.parents[statement] in above:  # it was certainly reached, so earlier ones no longer count
            break
    if not values:
        return [value for _, value in found] or None
    return values


def added_to(function: ast.FunctionDef, name: ast.Name) -> list[ast.expr]:
    """What is added to a name before it is used, under conditions."""
    added = [node for node in ast.walk(function) if isinstance(node, ast.AugAssign) and name_of(node.target) == name.id]
    return [node.value for node in sorted(added, key=lambda one: one.lineno) if node.lineno < name.lineno]


def _values_for(name: str, assignment: ast.Assign) -> Iterator[ast.expr]:
    for target in assignment.targets:
        if isinstance(target, ast.Name) and target.id == name:
            yield assignment.value
        elif isinstance(target, ast.Tuple) and isinstance(assignment.value, ast.Tuple):
            pairs = zip(target.elts, assignment.value.elts, strict=False)
            yield from (value for one, value in pairs if isinstance(one, ast.Name) and one.id == name)
        elif not isinstance(target, ast.Name) and name in _names(target):
            yield ast.Name(id="")


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _ancestors(node: ast.AST, module: Module) -> Iterator[ast.AST]:
    while node in module.parents:
        node = module.parents[node]
        yield node


def name_of(node: ast.AST) -> str:
    """`f` for `f` and for `a.b.f`, otherwise an empty text."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
