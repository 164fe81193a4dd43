"""Checks the shapes in the signatures of our functions while tests/stack runs.

tests/stack/conftest.py imports this first. From then on jaxtyping hands `check_shapes` every
function of these packages as it is imported, and every dataclass's __init__. Processes that a test
starts are not looked at.
"""

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, get_args

_CHECKED = [f"post_training.{name}" for name in ("data", "models", "train", "annotate")]


def check_shapes(function: Callable) -> Callable:
    """`function`, so that a call with a wrong shape or dtype raises. Other annotations than shapes
    are left alone: beartype can't check some of them, such as pydantic's protocols."""
    from beartype import beartype

    function.__annotations__ = {
        name: annotation if mentions_shape(annotation) else Any
        for name, annotation in function.__annotations__.items()
    }
    if all(annotation is Any for annotation in function.__annotations__.values()):
        return function
    return beartype(function)


def mentions_shape(annotation: object) -> bool:
    """Whether there is a shape in it: `Float[Tensor, "B T"]`, or a tuple, union, … of such."""
    # Here, as in check_shapes: hosts have neither.
    from jaxtyping import AbstractArray

    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return any(map(mentions_shape, get_args(annotation)))


# Hosts have no jaxtyping, but read tests/stack/conftest.py.
if find_spec("jaxtyping") is not None:
    from jaxtyping import install_import_hook

    install_import_hook(_CHECKED, f"{__name__}.{check_shapes.__name__}")
