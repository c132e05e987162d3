"""PEFT's names of the factors of parameters that have no module of their own: stacks of experts.

PEFT wraps the parameters' module once for each that is adapted, in the order in which PyTorch
registers them: the first is innermost. So a tensor's name shows at which depth its factors are, and
not of which parameter.
"""

from collections.abc import Mapping

from lowrank_optax.adapters.peft.module_names import Slot


def wrapper_names(slots: Mapping[str, Slot]) -> dict[str, str]:
    """The modules in PEFT's model that hold the factors of adapted parameters, by parameter.

    Args:
      slots: What is adapted; modules among it have no wrappers.

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
    return {
        name: module + ".base_layer" * (len(of_module) - 1 - i)
        for module, of_module in by_module.items()
        for i, name in enumerate(of_module)
    }
