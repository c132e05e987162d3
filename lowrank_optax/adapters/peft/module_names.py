"""The layers of a Flax model by the names they have in PyTorch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import itertools
import math
import re
from typing import Any, NamedTuple, TypeAlias

from flax import nnx
import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters.adapted_layers import (
    AdapterParam,
    set_weight_matrix,
    weight_matrix,
    weight_shape,
)
from lowrank_optax.adapters.peft.layouts import Layout
from lowrank_optax.matrices.selection import Path, near, path_string
from lowrank_optax.modules.spec import usable_weight

ModuleNames: TypeAlias = Mapping[str, str] | Callable[[str], str | None]
"""PyTorch's names of modules by their paths. In a mapping, ``{}`` in a path is the number of a
layer, which a stack has not, and in a name where it goes: ``"blocks/{}/attention/query":
"model.layers.{}.self_attn.q_proj"``. A function of a path returns a name, None for modules that
PyTorch has not, and ``{}`` where the numbers of a stack go."""

_WEIGHTS = ("kernel", "embedding", "scale")


class Slot(NamedTuple):
    """A module of PyTorch's in a Flax model.

    Attributes:
      path: Path of the Flax module.
      module: The Flax module, perhaps a stack.
      index: Its place in the stack; empty if there is none.
    """

    path: tuple[str, ...]
    module: Any
    index: tuple[int, ...]

    @property
    def is_layer(self) -> bool:
        """Whether adapters can be attached to it."""
        return usable_weight(self.module) is not None

    def layout(self) -> Layout | None:
        """How its weight lies; None if it is no layer that adapters can be attached to.

        Raises:
          ValueError: If its name has not as many ``{}`` as the weight has stack axes.
        """
        if not self.is_layer:
            return None
        *batch, d_in, d_out = weight_shape(self.module)
        if len(batch) != len(self.index):
            raise ValueError(
                f"{path_string(self.path)}: its weight is a stack of {tuple(batch)} matrices, but "
                f"its PyTorch name has {len(self.index)} number(s) left for them."
            )
        if isinstance(self.module, nnx.Embed):
            return Layout("embedding", d_in, d_out)
        if isinstance(self.module, nnx.Conv):
            return Layout("convolution", d_in, d_out, self.module.kernel.shape[len(batch) : -2])
        return Layout("linear", d_in, d_out)

    def parameters(self) -> dict[str, str]:
        """The module's own parameters: PyTorch's name (``weight``, ``bias``) to Flax's.

        Raises:
          ValueError: If one has no such name.
        """
        own = [
            name
            for name, x in vars(self.module).items()
            if isinstance(x, nnx.Param) and not isinstance(x, AdapterParam)
        ]
        foreign = [name for name in own if name not in (*_WEIGHTS, "bias")]
        if foreign:
            raise ValueError(f"{path_string(self.path)}: {foreign} have no name in PyTorch.")
        return {"bias" if name == "bias" else "weight": name for name in own}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """PyTorch's shapes of its parameters."""
        layout = self.layout()
        return {
            parameter: layout.weight_shape
            if layout and parameter == "weight"
            else (math.prod(self._variable(parameter).shape[len(self.index) :]),)
            for parameter in self.parameters()
        }

    def read(self, parameter: str) -> np.ndarray:
        """A parameter in PyTorch's layout."""
        layout = self.layout()
        if layout is None or parameter == "bias":
            value = np.asarray(self._variable(parameter)[...])[self.index]
            return value.reshape(-1)
        return layout.pack_weight(np.asarray(weight_matrix(self.module))[self.index])

    def cast(self, parameter: str, tensor: np.ndarray) -> np.ndarray:
        """PyTorch's tensor in the model's own dtype."""
        return tensor.astype(self._variable(parameter).get_value().dtype)

    def write(self, parameter: str, tensor: np.ndarray) -> None:
        """Sets a parameter from PyTorch's tensor, in the model's own dtype."""
        layout, variable = self.layout(), self._variable(parameter)
        if layout is None or parameter == "bias":
            value = np.array(variable[...])
            value[self.index] = tensor.reshape(value[self.index].shape).astype(value.dtype)
            variable.set_value(jnp.asarray(value))
        else:
            matrices = np.array(weight_matrix(self.module))
            matrices[self.index] = layout.unpack_weight(tensor).astype(matrices.dtype)
            set_weight_matrix(self.module, jnp.asarray(matrices))

    def _variable(self, parameter: str) -> Any:
        return getattr(self.module, self.parameters()[parameter])


def module_slots(model: Any, names: ModuleNames | None) -> dict[str, Slot]:
    """Every module of the model that PyTorch has, by its name there.

    Args:
      model: An NNX model.
      names: What the modules are called; None for the model's own ``huggingface_names``.

    Raises:
      ValueError: If there are no names, two modules have one name, or a path of a mapping matches
        no module that has parameters.
    """
    of_model = getattr(model, "huggingface_names", None)
    names = of_model if names is None else names
    if names is None:
        raise ValueError(
            f"names=None: {type(model).__name__} has no huggingface_names, so say what its modules "
            'are called in PyTorch, for example names={"layers/{}/query": "layers.{}.q_proj"}.'
        )
    name_of = names if callable(names) else _by_template(names)
    modules = dict(_modules(model))
    found: dict[str, Slot] = {}
    for path, module in modules.items():
        template = name_of(path_string(path))
        if template is None:
            continue
        for name, slot in _of_stack(template, path, module):
            if name in found:
                both = f"{path_string(found[name].path)} and {path_string(path)}"
                raise ValueError(f"names: {both} are both called {name}.")
            found[name] = slot
    if not found:
        paths = ", ".join(path_string(path) for path in list(modules)[:5])
        raise ValueError(f"names has none of the model's modules, which are {paths}, ....")
    if not callable(names):
        known = {} if of_model is None or callable(of_model) else of_model
        # A model's own names are those of all models of its class.
        _check_all_match([path for path in names if path not in known], modules)
    return found


def _modules(model: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Modules that have parameters of their own."""
    for path, module in nnx.iter_modules(model):
        path = tuple(map(str, path))
        inside = {"adapters", "adapter_groups", "own_values"} & set(path)
        if not inside and any(isinstance(x, nnx.Param) for x in vars(module).values()):
            yield path, module


def _of_stack(template: str, path: tuple[str, ...], module: Any) -> Iterator[tuple[str, Slot]]:
    """The modules of a stack, or the one that is none."""
    axes = template.count("{}")
    params = [x for x in vars(module).values() if isinstance(x, nnx.Param)]
    for index in itertools.product(*map(range, params[0].shape[:axes])):
        yield template.format(*index), Slot(path, module, index)


def _by_template(names: Mapping[str, str]) -> Callable[[str], str | None]:
    """A function of a path: ``{}`` stands for a number, or in a stack for none."""
    unequal = [f"{path!r}: {name!r}" for path, name in names.items() if _holes(path, name)]
    if unequal:
        raise ValueError(f"names has paths with other numbers of {{}} than names: {unequal}.")
    patterns = [(_pattern(path), name) for path, name in names.items()]

    def name_of(path: str) -> str | None:
        for pattern, name in patterns:
            if match := pattern.match(path):
                return name.format(*("{}" if n is None else n for n in match.groups()))
        return None

    return name_of


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path).replace(re.escape("/{}"), r"(?:/(\d+))?") + "$")


def _check_all_match(patterns: list[str], modules: Iterable[Path]) -> None:
    paths = [path_string(path) for path in modules]
    idle = [path for path in patterns if not any(map(_pattern(path).match, paths))]
    if idle:
        raise ValueError(
            f"names has {', '.join(map(repr, idle))}, which match no module of the model with "
            f"parameters of its own; {near(modules, idle[0])}"
        )


def _holes(path: str, name: str) -> bool:
    return path.count("/{}") != name.count("{}") or path.count("{}") != name.count("{}")
