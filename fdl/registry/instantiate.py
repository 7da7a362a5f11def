"""Construction of components: from ``{target, args}`` to an object.

A component is first checked along the annotations of its constructor, as a recipe is when it is read, and then built
from the checked tree, so that checks and construction cannot disagree.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fdl.errors import UserError
from fdl.registry.checking import CheckedComponent, ConfigChecker, Converted, map_items
from fdl.registry.kinds import KINDS
from fdl.utils.imports import import_dotted

if TYPE_CHECKING:
    from fdl.registry.component import Component


def instantiate(component: Component | Mapping[str, Any], kind: str, key: str, **supplied: Any) -> Any:
    """Import and construct a component, and those among its arguments.

    Args:
        component: ``target`` and ``args``.
        kind: the name of one of `fdl.registry.kinds.KINDS`.
        key: its full dotted key in the recipe, for messages.
        supplied: arguments from fdl, passed where the constructor takes them and the recipe gives none.

    Returns:
        An instance of the kind's base class.

    Raises:
        UserError: the component cannot be found or its constructor refuses the arguments; the message has the key.
    """
    tree = component if isinstance(component, Mapping) else {"target": component.target, "args": component.args}
    checker = ConfigChecker(supplied)
    checked = checker.read_component(tree, KINDS[kind], key)
    if checker.problems:
        raise UserError("\n".join(f"{where}: {message}" for where, message in checker.problems))
    return _build(checked, supplied)


def _build(checked: Any, supplied: Mapping[str, Any]) -> Any:
    """Build a checked value: the components in it are constructed, innermost first."""
    if isinstance(checked, CheckedComponent):
        return _construct(checked, _build(checked.config["args"], supplied), supplied)
    if isinstance(checked, Converted):
        return checked.convert(_build(checked.value, supplied))
    return map_items(lambda item: _build(item, supplied), checked)


def _construct(component: CheckedComponent, args: dict[str, Any], supplied: Mapping[str, Any]) -> Any:
    """Import the target of a component and call it with built arguments and with those from fdl that it takes."""
    target, key = component.target, component.key
    parameters = target.signature.parameters if target.signature is not None else {}
    args |= {name: value for name, value in supplied.items() if name in parameters and name not in args}
    factory = target.load()
    try:
        result = factory(**args)
    except (UserError, ValueError, TypeError) as error:
        raise UserError(f"{_blamed(error, key, args)}: {_explain(error)}") from error
    if not isinstance(result, import_dotted(component.kind.base)):
        made = f"{target.path} made a {type(result).__name__}"
        raise UserError(f"{key}: {made}, expected {component.kind} ({component.kind.base})")
    return result


def _blamed(error: Exception, key: str, args: Mapping[str, Any]) -> str:
    """Return the key of the argument that a constructor's message begins with, else the component's key."""
    first = str(error).split(" ", 1)[0].rstrip(":,")
    return f"{key}.args.{first}" if first in args else key


def _explain(error: Exception) -> str:
    """Return a constructor's message, with file and line if it is not a UserError."""
    if isinstance(error, UserError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error} ({type(error).__name__}, {last.filename}:{last.lineno})"
