"""Types as Python's annotations write them, to JSON Schema: xLAM declares its tools so.

str                      {"type": "string"}
List[int]                {"type": "array", "items": {"type": "integer"}}
Dict[str, float]         {"type": "object", "additionalProperties": {"type": "number"}}
Union[int, str]          {"anyOf": [{"type": "integer"}, {"type": "string"}]}
int, optional            {"type": "integer"}, and the argument may be left out
"""

import ast
import re
from typing import Any

Schema = dict[str, Any]

_PLAIN = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_LISTS = ("list", "tuple", "set", "sequence", "iterable")
_OBJECTS = ("dict", "mapping")
_MAY_BE_LEFT_OUT = re.compile(r"\s*,\s*(optional|default)\b.*\Z", re.IGNORECASE | re.DOTALL)


def parse_type(written: str) -> tuple[Schema, bool] | None:
    """The schema of values of the type, and whether the argument may be left out; None for a type
    that JSON has no values of, such as Callable."""
    rest = _MAY_BE_LEFT_OUT.search(written)
    try:
        tree = ast.parse(written[: rest.start()] if rest else written.strip(), mode="eval").body
        optional = isinstance(tree, ast.Subscript) and _name(tree.value) == "optional"
        return _schema(tree), optional or rest is not None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _schema(tree: ast.expr) -> Schema:
    """Errors: ValueError for a type without values in JSON."""
    if isinstance(tree, ast.Constant) and tree.value is None:
        return {"type": "null"}
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
        return {"anyOf": [_schema(tree.left), _schema(tree.right)]}
    if not isinstance(tree, ast.Subscript):
        return _schema_of(_name(tree), [])
    inside = tree.slice.elts if isinstance(tree.slice, ast.Tuple) else [tree.slice]
    return _schema_of(_name(tree.value), inside)


def _schema_of(name: str, inside: list[ast.expr]) -> Schema:
    if name in _PLAIN and not inside:
        return {"type": _PLAIN[name]}
    if name == "any" and not inside:
        return {}
    if name == "literal" and inside:
        return {"enum": [ast.literal_eval(each) for each in inside]}
    # The dots of Tuple[int, ...] say how many there are, and no type.
    inner = [_schema(each) for each in inside if not _is_dots(each)]
    if name in _LISTS:
        items = _one_of(inner)
        return {"type": "array", **({"items": items} if items else {})}
    if name in _OBJECTS:
        values = inner[1] if len(inner) == 2 else {}
        return {"type": "object", **({"additionalProperties": values} if values else {})}
    if name in ("union", "optional") and inner:
        return _one_of(inner)
    raise ValueError(name)


def _one_of(schemas: list[Schema]) -> Schema:
    different = [each for n, each in enumerate(schemas) if each not in schemas[:n]]
    if {} in different or not different:
        return {}
    return different[0] if len(different) == 1 else {"anyOf": different}


def _name(tree: ast.expr) -> str:
    """In lower case, without the module: list and typing.List are one."""
    if isinstance(tree, ast.Attribute):
        return tree.attr.lower()
    if isinstance(tree, ast.Name):
        return tree.id.lower()
    raise ValueError(ast.dump(tree))


def _is_dots(tree: ast.expr) -> bool:
    return isinstance(tree, ast.Constant) and tree.value is ...
