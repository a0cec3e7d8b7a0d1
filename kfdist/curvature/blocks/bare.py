"""Which bare parameters of a module are matrices that it multiplies with, or tables that it looks rows up in.

A parameter with no layer around it (a router's `weight`, a projection of a whole model) could be anything: positions,
a scale. A block must be planned before the first forward, so the source of the module's class is read for products
and calls of `F.embedding` in which the parameter stands. What this misses keeps its gradient, with a reason; what it
finds wrongly is never measured, and that is said. It costs nothing when the model runs.
"""

import ast
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from functools import lru_cache
from typing import Literal

from torch import nn

Use = Literal[
    "matrix",
    "transpose",
    "table",
    "matrix, folded after 1",
    "matrix, folded after 2",
    "transpose, folded after 1",
    "transpose, folded after 2",
]
"""A matrix as `F.linear` takes it, or its transpose `[..., q, p]`; a table of rows that are looked up.

Of three dimensions, one "folded after 1" is a matrix whose columns have two of them, one "folded after 2" has two for
its rows.
"""

_LEFT, _RIGHT, _ROWS = "left", "right", "rows"

_OPERANDS: Mapping[str, Mapping[int | str, str]] = {
    "linear": {1: _LEFT, "weight": _LEFT},
    "matmul": {0: _LEFT, 1: _RIGHT, "input": _LEFT, "other": _RIGHT},
    "mm": {0: _LEFT, 1: _RIGHT, "input": _LEFT, "mat2": _RIGHT},
    "bmm": {0: _LEFT, 1: _RIGHT, "input": _LEFT, "mat2": _RIGHT},
    "addmm": {1: _LEFT, 2: _RIGHT, "mat1": _LEFT, "mat2": _RIGHT},
    "baddbmm": {1: _LEFT, 2: _RIGHT, "batch1": _LEFT, "batch2": _RIGHT},
    "grouped_mm": {1: _RIGHT, "mat_b": _RIGHT},
    "_grouped_mm": {1: _RIGHT, "mat2": _RIGHT},
    "embedding": {1: _ROWS, "weight": _ROWS},
}
"""Where functions take a weight, and from which side it multiplies there; a method's first is before it."""

_METHODS = frozenset({"matmul", "mm", "bmm", "addmm", "baddbmm"})
"""Those that tensors have too; modules may be called by the names of the others."""

_FOLDED: Mapping[tuple[str, str], Use] = {
    (_LEFT, "folded after 1"): "matrix, folded after 1",
    (_LEFT, "folded after 2"): "matrix, folded after 2",
    (_RIGHT, "folded after 1"): "transpose, folded after 1",
    (_RIGHT, "folded after 2"): "transpose, folded after 2",
}

_MODULES = frozenset({"torch", "nn", "F", "functional"})

_TURNING = frozenset({"T", "mT", "t", "transpose", "swapaxes", "permute"})

_SAME = frozenset({"to", "type_as", "type", "float", "double", "half", "bfloat16", "contiguous", "clone", "squeeze",
                   "values", "items", "parameters"})  # fmt: skip


_HOLDERS = (nn.ParameterList, nn.ParameterDict)


def bare_matrices(module: nn.Module) -> Mapping[str, Use]:
    """Returns the parameters of a module, of two or three dimensions, that its code uses as matrices or tables.

    What is used in several ways has the way that stands first, but a matrix before a table (docs/decisions/0018).
    """
    shaped = wide_parameters(module)
    found = _uses_in(type(module)) if shaped else {}
    return {name: min(found[name], key=lambda use: use == "table") for name in shaped if name in found}


def held_matrices(model: nn.Module) -> Mapping[int, Use]:
    """Returns how the code of modules uses what is in their lists and dictionaries of parameters, by the id of these.

    All in one are taken for used alike.
    """
    found: dict[int, Use] = {}
    for module in model.modules():
        if not any(isinstance(child, _HOLDERS) for child in module.children()):
            continue  # reading the code of every class takes as long as some training steps
        for name, uses in _uses_in(type(module)).items():
            held = getattr(module, name, None) if "." not in name else None
            if isinstance(held, _HOLDERS) and uses[0] != "table":
                found.setdefault(id(held), uses[0])
    return found


def wide_parameters(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """Returns the parameters of a module that may be matrices, or stacks of them."""
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() in (2, 3) and _wide(parameter)
    }


def bare_tables(module: nn.Module) -> Set[str]:
    """Returns those of `bare_matrices` that are looked up, whatever else is done with them."""
    found = _uses_in(type(module))
    return {name for name in bare_matrices(module) if "table" in found[name]}


def multiplied_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the weights of modules inside that a module's own code multiplies with, as a head with its embedding's."""
    for path, uses in _uses_in(type(module)).items():
        if "." in path and "matrix" in uses:
            with suppress(AttributeError):  # the code is that of a base, whose modules this one may not have
                yield module.get_parameter(path)


def _wide(parameter: nn.Parameter) -> bool:
    """Whether it is no vector with dimensions of 1 around it."""
    return min(parameter.shape[-2:]) > 1


@lru_cache(maxsize=256)
def _uses_in(kind: type[nn.Module]) -> Mapping[str, Sequence[Use]]:
    """Returns the attributes in products and lookups of a class's code, and what they are there, in their order."""
    found: dict[str, list[Use]] = defaultdict(list)
    for base in kind.__mro__:
        if base is nn.Module:
            break
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue  # made in a console, or by code: nothing is known of it
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                for name, use in _Products(function).found():
                    found[name].append(use)
    return found


class _Products:
    """The products and lookups in one function's code."""

    def __init__(self, function: ast.FunctionDef) -> None:
        self._function = function
        self._values = {
            target.id: node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        self._looped: dict[ast.expr, ast.expr] = {}
        for loop in ast.walk(function):  # inner loops come after outer ones
            for part in [loop] if isinstance(loop, ast.For) else getattr(loop, "generators", []):
                given = _of_loop(part.target, part.iter)
                self._looped |= {
                    each: given[each.id] for each in ast.walk(loop) if isinstance(each, ast.Name) and each.id in given
                }

    def found(self) -> Iterator[tuple[str, Use]]:
        """Yields the attributes of self that are used, and what they are."""
        for node in ast.walk(self._function):
            for operand, side in _operands(node):
                name, turned = self._attribute(operand)
                side, _, fold = side.partition(", ")
                if name and fold and not turned:
                    yield name, _FOLDED[side, fold]
                elif name and not fold and side != _ROWS:
                    yield name, "transpose" if turned != (side == _RIGHT) else "matrix"
                elif name and not fold and not turned:
                    yield name, "table"

    def _attribute(self, node: ast.expr, depth: int = 8) -> tuple[str, bool]:
        """Returns which attribute of self an operand is, or shows, and whether turned round; no name if none."""
        if not depth:
            return "", False
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return name, False
            case ast.Attribute(attr="weight") if path := _path(node):
                return path, False
            case ast.Name() if node in self._looped:
                return self._attribute(self._looped[node], depth - 1)
            case ast.Name(id=name) if name in self._values:
                return self._attribute(self._values[name], depth - 1)
            case ast.Subscript(value=inner):
                return self._attribute(inner, depth - 1)
            case ast.Attribute(value=inner, attr=how) | ast.Call(func=ast.Attribute(value=inner, attr=how)):
                if how not in _TURNING | _SAME:
                    return "", False
                name, turned = self._attribute(inner, depth - 1)
                return name, turned != (how in _TURNING)
            case _:
                return "", False


def folded(letters: str, others: str, output: str) -> int:
    """Returns after how many of an operand's dimensions those end that are summed over, or those that are made.

    0 where they don't lie so, or others meet both.
    """
    kinds = [letter in output for letter in letters]
    apart = all((letter in output) != (letter in others) for letter in letters)
    ends = [place for place in range(1, len(kinds)) if kinds[place] != kinds[place - 1]]
    return ends[0] if apart and len(ends) == 1 and len(set(letters)) == len(letters) else 0


def _of_loop(target: ast.expr, values: ast.expr) -> Mapping[str, ast.expr]:
    """Returns, by the names that a loop gives its values, what these are elements of."""
    match target, values:
        case ast.Name(id=name), _:
            return {name: values}
        case ast.Tuple(elts=[_, ast.Name(id=name)]), ast.Call(func=ast.Name(id="enumerate"), args=[of, *_]):
            return {name: of}
        case ast.Tuple(elts=names), ast.Call(func=ast.Name(id="zip"), args=of):
            return {each.id: held for each, held in zip(names, of, strict=False) if isinstance(each, ast.Name)}
        case ast.Tuple(elts=[_, ast.Name(id=name)]), ast.Call(func=ast.Attribute(attr="items")):
            return {name: values}
        case _:
            return {}


def _path(node: ast.expr) -> str:
    """Returns the dotted name of what is inside of self; empty if it isn't."""
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return name
        case ast.Attribute(value=inner, attr=name):
            path = _path(inner)
            return f"{path}.{name}" if path else ""
        case _:
            return ""


def _operands(node: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """Yields the operands of a product that may be weights, and from which side they multiply."""
    match node:
        case ast.BinOp(op=ast.MatMult(), left=left, right=right):
            yield left, _LEFT
            yield right, _RIGHT
        case ast.Call(
            func=ast.Name(id="einsum") | ast.Attribute(attr="einsum"), args=[ast.Constant(value=str(text)), *args]
        ):
            yield from _of_einsum(text, args)
        case ast.Call(func=ast.Attribute(value=inner, attr=how), args=args, keywords=keywords) if how in _OPERANDS:
            is_function = ast.unparse(inner).split(".")[0] in _MODULES
            if is_function or how in _METHODS:
                yield from _of_call(how, args if is_function else [inner, *args], keywords)
        case ast.Call(func=ast.Name(id=how), args=args, keywords=keywords) if how in _OPERANDS:
            yield from _of_call(how, args, keywords)
        case _:
            return


def _of_call(how: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Iterator[tuple[ast.expr, str]]:
    sides = _OPERANDS[how]
    for place, operand in (*enumerate(args), *((each.arg, each.value) for each in keywords)):
        if place is not None and place in sides:
            yield operand, sides[place]


def _of_einsum(text: str, operands: list[ast.expr]) -> Iterator[tuple[ast.expr, str]]:
    inputs, _, output = text.replace(" ", "").partition("->")
    terms = inputs.split(",")
    for place, (operand, letters) in enumerate(zip(operands, terms, strict=False)):
        others = "".join(terms[:place] + terms[place + 1 :])
        if len(letters) >= 2 and all(stack in others and stack in output for stack in letters[:-2]):
            yield operand, _LEFT if letters[-1] not in output else _RIGHT
        elif len(letters) == 3 and (fold := folded(letters, others, output)):
            yield operand, f"{_LEFT if letters[-1] not in output else _RIGHT}, folded after {fold}"
        elif len(letters) == 3 and letters[0] in output and folded(letters[1:], others, output):
            yield operand, _LEFT if letters[-1] not in output else _RIGHT  # each of a stack meets all of the input
