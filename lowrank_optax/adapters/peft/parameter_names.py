"""PEFT's names of the modules that hold an adapter's tensors, where it adapts parameters.

Stacks of experts are parameters without a module of their own. PEFT wraps their module once for
each that is adapted, in the order in which PyTorch registers them: the first is innermost. So a
tensor's name shows at which depth its factors are, and not of which parameter.
"""

from collections.abc import Callable, Iterable, Mapping

from lowrank_optax.adapters.peft.config import UnsupportedConfigError
from lowrank_optax.adapters.peft.module_names import Slot


def names_in_peft(slots: Mapping[str, Slot]) -> Callable[[str], str]:
    """The name in PEFT's model of what holds the tensors of a module or of a parameter.

    Args:
      slots: What is adapted; modules among it have no such wrappers, but may be inside one.

    Raises:
      ValueError: If the order of several parameters of a module is not known, or PEFT cannot wrap
        one, as it is the model's own.
    """
    by_module: dict[str, list[str]] = {}
    for name in sorted(slots, key=lambda name: slots[name].order or 0):
        if slots[name].is_parameter:
            by_module.setdefault(name.rpartition(".")[0], []).append(name)
    if own := by_module.get(""):
        raise ValueError(f"names: {own[0]!r} is no parameter of a module: PEFT cannot adapt it.")
    for of_module in by_module.values():
        if len(of_module) > 1 and slots[of_module[0]].order is None:
            raise ValueError(
                f"names is a function, and the adapter is on {' and '.join(of_module)}, whose "
                "tensors are named by the order in which PyTorch registers these parameters: give "
                "names as a mapping in this order."
            )

    def outermost(module: str) -> str:
        parent, _, last = module.rpartition(".")
        inside = ".base_layer" * len(by_module.get(parent, ()))
        return f"{outermost(parent)}{inside}.{last}" if parent else module

    def name_of(name: str) -> str:
        module = name.rpartition(".")[0]
        of_module = by_module.get(module, [])
        if name not in of_module:
            return outermost(name)
        return outermost(module) + ".base_layer" * (len(of_module) - 1 - of_module.index(name))

    return name_of


def check_saved(saved: Iterable[str], adapted: Mapping[str, Slot]) -> None:
    """Raises UnsupportedConfigError if one of ``modules_to_save`` is inside such a wrapper."""
    wrapped = {name.rpartition(".")[0] for name, slot in adapted.items() if slot.is_parameter}
    for name in saved:
        around = next((module for module in wrapped if name.startswith(f"{module}.")), None)
        if around is not None:
            raise UnsupportedConfigError(
                f"modules_to_save has {name}, and parameters of {around}, which it is inside, have "
                "adapters (target_parameters): PEFT trains no module inside such a wrapper. Adapt "
                f"{name} as well instead, or leave the parameters of {around} without adapters."
            )
