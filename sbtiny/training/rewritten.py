"""Trainers of TRL that another library has rewritten, and whether ours still fit on top of them.

On a GPU unsloth replaces TRL's trainers by classes that it writes from their source. Ours override some of their methods and read some of
their attributes. A release of unsloth that renames one of these would otherwise end a run in its first step, or change what it does.
"""

import ast
import inspect
import sys
import textwrap
from functools import cache

from sbtiny.errors import InputError
from sbtiny.progress import console


def is_rewritten(ours: type) -> bool:
    """Whether the trainer below ours is another than TRL's."""
    return not ours.__bases__[0].__module__.startswith("trl.")


def choose_trainer(ours: type, needed: str = "") -> type:
    """Our trainer; where it does not fit on a rewritten one, that one itself, and a line that says so.

    Raises InputError then if only ours can do what is `needed`.
    """
    if not is_rewritten(ours) or not (line := describe_misfit(ours)):
        return ours
    if needed:
        raise InputError(f"{line}, which {needed} needs: use --backend transformers")
    console.print(f"{line}: training goes on with other batches, and slower", markup=False, soft_wrap=True, style="yellow")
    return ours.__bases__[0]


def describe_misfit(ours: type) -> str:
    """One line about what keeps our trainer from the one below it; empty where it fits."""
    gaps = "; ".join(find_gaps(ours))
    return f"{ours.__bases__[0].__module__} does not fit sbtiny's {ours.__name__} ({gaps})" if gaps else ""


def find_gaps(ours: type) -> list[str]:
    """What our trainer overrides or reads and the classes below it lack, each in a few words."""
    bases = ours.__mro__[1:-1]
    known = {name for base in bases for name in vars(base)} | set().union(*map(assigned_names, bases))
    own = {name for name, value in vars(ours).items() if not inspect.isfunction(value)}
    missing = [f"no {name}" for name in sorted(read_names(ours) - known - own)]
    methods = [name for name, value in vars(ours).items() if inspect.isfunction(value)]
    return missing + [f"{name} takes other arguments" for name in methods if hasattr(bases[0], name) and not same_arguments(ours, name)]


def same_arguments(ours: type, method: str) -> bool:
    """Whether the method below ours takes the arguments that ours names, in their order."""
    own = [p.name for p in parameters(getattr(ours, method)) if p.kind is p.POSITIONAL_OR_KEYWORD]
    below = [p.name for p in parameters(getattr(ours.__bases__[0], method))]
    return below[: len(own)] == own


def parameters(function: object) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def read_names(ours: type) -> set[str]:
    """Names after `self.` and `super().` in our class."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(ours)))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")}


def assigned_names(base: type) -> set[str]:
    """Attributes that the class sets on `self`, and the other classes of its file."""
    return {
        node.attr
        for node in ast.walk(module_tree(base.__module__))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


@cache
def module_tree(name: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[name]))
