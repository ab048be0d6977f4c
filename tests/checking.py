"""The package's annotations are checked by beartype and jaxtyping on every call, in tests only.

jaxtyping's import hook decorates every function, closures anew whenever they are defined, which
tracing does thousands of times. Here the checks are built at a function's first call, and once for
all closures of one source. A function without annotations is left as it is; one whose annotations
have no shapes needs beartype only.
"""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable

import beartype
import jaxtyping

_decorate = jaxtyping.jaxtyped
_SHARED: dict[tuple, Callable] = {}
_SHAPELESS = beartype.beartype(conf=beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def set_up(package: str) -> None:
    """Before the package's first import."""
    jaxtyping.jaxtyped = _jaxtyped  # what modules that the hook compiles look up
    jaxtyping.install_import_hook(package, "beartype.beartype")


def _jaxtyped(decorated=None, **options):
    if decorated is None:
        return functools.partial(_jaxtyped, **options)
    if dataclasses.is_dataclass(decorated):
        if "__init__" in vars(decorated):
            decorated.__init__ = _lazily(decorated.__init__, **options)
        return decorated
    if isinstance(decorated, types.FunctionType):
        return _lazily(decorated, **options)
    return _decorate(decorated, **options)


def _lazily(function: types.FunctionType, **options) -> Callable:
    if not function.__annotations__:
        return function
    checked = None

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal checked
        __tracebackhide__ = True
        if checked is None:
            checked = _checked(function, **options)
        return checked(*args, **kwargs)

    return call


def _checked(function: types.FunctionType, typechecker: Callable) -> Callable:
    if "<locals>" in function.__qualname__:
        key = function.__code__, *function.__annotations__.items()
        if key not in _SHARED:
            _SHARED[key] = _decorate(_caller(function), typechecker=typechecker)
        return functools.partial(_SHARED[key], function)
    if any(map(_has_shapes, function.__annotations__.values())):
        return _decorate(function, typechecker=typechecker)
    return _SHAPELESS(function)


def _has_shapes(annotation: object) -> bool:
    if isinstance(annotation, (str, typing.ForwardRef)):
        return True  # for all one knows
    if type(annotation).__module__.startswith("jaxtyping"):
        return True
    values = {typing.Literal: 0, typing.Annotated: 1}.get(typing.get_origin(annotation))
    return any(map(_has_shapes, typing.get_args(annotation)[:values]))


def _caller(like: types.FunctionType) -> types.FunctionType:
    """Calls its first argument with the others, which are annotated as those of `like`."""

    def call(function, /, *args, **kwargs):
        return function(*args, **kwargs)

    caller = types.FunctionType(call.__code__, like.__globals__, like.__name__)
    caller.__qualname__, caller.__module__ = like.__qualname__, like.__module__
    signature = inspect.signature(like)
    first = inspect.Parameter("function_", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [first, *signature.parameters.values()]
    caller.__signature__ = signature.replace(parameters=parameters)
    return caller
