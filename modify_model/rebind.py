"""Run a Python function with other functions inside, in place of those that it calls, however its code spells them.

The processors of diffusers, and those that users write, call attention as ``F.scaled_dot_product_attention``,
``torch.nn.functional.scaled_dot_product_attention``, by a name of their own, or in a helper function. A rebound
function is the same code with other globals. Nothing is patched in place: what is not rebound (cross-attention, text
encoders, VAEs) calls what it always called.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterator
from typing import Any

Table = tuple[tuple[Any, Any], ...]  # (function, what takes its place)

_FOREIGN = {"torch", *sys.stdlib_module_names}  # functions of these are not looked into


def rebound(function: types.FunctionType, table: Table) -> types.FunctionType:
    """A copy of a function that calls, itself and in its helper functions, what the table puts in place of others.

    Names are followed through globals, closures and default values, and through modules (``torch.nn.functional``,
    aliases). A function that reaches nothing in the table is returned as it is.
    """
    return _Search(table).function(function)


def obstacle(target: Any, table: Table) -> str | None:
    """Where calling an object reaches something in the table that :func:`rebound` does not replace, or None.

    A rebound ``__call__`` still finds the object's own methods and attributes, and runs its import statements.
    """
    call = type(target).__call__
    names, search = _names(call.__code__), _Search(table)
    owners = [("self", getattr(target, "__dict__", {})), *((cls.__name__, vars(cls)) for cls in type(target).__mro__)]
    for owner, members in owners:
        for name in names & members.keys():
            value = getattr(members[name], "__func__", members[name])  # of a static or class method
            if value is not call and search.value(value, names) is not value:
                return f"{owner}.{name}"
    for code in _codes(call.__code__):
        steps = list(dis.get_instructions(code))
        for step, before in zip(steps[1:], steps, strict=False):
            module = sys.modules.get(step.argval) if step.opname == "IMPORT_NAME" else None
            # `from module import a, b` has loaded the names just before.
            imported = [vars(module).get(name) for name in before.argval] if module and before.argval else [module]
            if any(search.value(value, names) is not value for value in imported):
                return "an import statement inside __call__"
    return None


class _Search:
    """One search for what a table replaces; functions are looked into once."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.seen: dict[types.FunctionType, types.FunctionType] = {}

    def value(self, value: Any, names: set[str], path: tuple[Any, ...] = ()) -> Any:
        """What takes the place of a value that code with these names uses; the value itself if nothing does."""
        for old, new in self.table:
            if value is old:
                return new
        if isinstance(value, types.FunctionType) and str(value.__module__).split(".")[0] not in _FOREIGN:
            return self.function(value)
        if isinstance(value, types.ModuleType) and not any(value is module for module in path):
            inside = {name: vars(value)[name] for name in names & vars(value).keys()}
            changed = self._changed(inside, names, (*path, value))
            if changed:
                return _Module(value, changed)
        return value

    def function(self, function: types.FunctionType) -> types.FunctionType:
        """See :func:`rebound`."""
        if function in self.seen:
            return self.seen[function]
        self.seen[function] = function  # what a recursive function finds
        names, scope = _names(function.__code__), function.__globals__
        cells = dict(enumerate(function.__closure__ or ()))
        values = dict(enumerate(function.__defaults__ or ()))
        keywords = function.__kwdefaults__ or {}
        new_scope = self._changed({name: scope[name] for name in names & scope.keys()}, names)
        new_cells = self._changed({i: cell.cell_contents for i, cell in cells.items() if _filled(cell)}, names)
        new_values, new_keywords = self._changed(values, names), self._changed(keywords, names)
        if new_scope or new_cells or new_values or new_keywords:
            closure = tuple({**cells, **{i: types.CellType(value) for i, value in new_cells.items()}}.values())
            defaults = tuple({**values, **new_values}.values())
            globals_ = _Scope(scope, new_scope)
            new = types.FunctionType(function.__code__, globals_, function.__name__, defaults or None, closure or None)
            new.__kwdefaults__ = {**keywords, **new_keywords}
            self.seen[function] = new
        return self.seen[function]

    def _changed(self, values: dict[Any, Any], names: set[str], path: tuple[Any, ...] = ()) -> dict[Any, Any]:
        """Those of some values that something else takes the place of."""
        found = {key: (value, self.value(value, names, path)) for key, value in values.items()}
        return {key: new for key, (value, new) in found.items() if new is not value}


class _Scope(dict[str, Any]):
    """The globals of a function, some replaced; the others are read where they are, as they change."""

    def __init__(self, scope: dict[str, Any], changed: dict[str, Any]) -> None:
        super().__init__({**scope, **changed})  # what torch.compile reads
        self.pop("__name__", None)  # by it, torch.compile would look names up in the original module
        self.scope, self.changed = scope, changed

    def __getitem__(self, name: str) -> Any:
        return self.changed[name] if name in self.changed else self.scope[name]


class _Module(types.SimpleNamespace):
    """A module with some attributes replaced."""

    def __init__(self, module: types.ModuleType, changed: dict[str, Any]) -> None:
        super().__init__(**{**vars(module), **changed, "_module": module})

    def __getattr__(self, name: str) -> Any:  # what a module makes when it is first asked for
        return getattr(self.__dict__["_module"], name)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and those of the functions that it defines."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _names(code: types.CodeType) -> set[str]:
    """The globals and attributes that code names, also as strings (for ``getattr``)."""
    constants = (x for part in _codes(code) for x in part.co_consts if isinstance(x, str))
    return {name for part in _codes(code) for name in part.co_names}.union(constants)


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
