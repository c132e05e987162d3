"""The layers of a Flax model by the names they have in PyTorch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import itertools
import math
import re
from typing import Any, NamedTuple, TypeAlias
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters.adapted_layers import (
    AdapterParam,
    AlsoTrained,
    LayerAdapter,
    set_weight_matrix,
    weight_matrix,
    weight_shape,
)
from lowrank_optax.adapters.peft.config import MERGE_IN_PEFT, BaseConfig, UnsupportedConfigError
from lowrank_optax.adapters.peft.tensors import Layout, Tensors, Tied
from lowrank_optax.matrices.selection import Path, near, path_string
from lowrank_optax.modules.select import modules_by_path
from lowrank_optax.modules.spec import usable_weight

ModuleNames: TypeAlias = Mapping[str, str] | Callable[[str], str | None]
"""PyTorch's names of modules by their paths. In a mapping, ``{}`` in a path is the number of a
layer, which the path of a stack lacks, and in a name where it goes: ``"blocks/{}/attention/query":
"model.layers.{}.self_attn.q_proj"``. A function of a path returns a name with ``{}`` where the
numbers of a stack go, or None for modules that PyTorch does not have. A layer of experts has the
name of a parameter; those of one PyTorch module are listed in the order of their registration."""

_WEIGHTS = ("kernel", "embedding", "scale")


class Slot(NamedTuple):
    """A module of PyTorch's in a Flax model.

    Attributes:
      path: Path of the Flax module.
      module: The Flax module, perhaps a stack.
      index: Its index in the stack; empty if there is none.
      order: Its position in ``names``, by which PyTorch's parameters of one module are registered;
        None if a function gives the names.
    """

    path: Path
    module: Any
    index: tuple[int, ...]
    order: int | None = None

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the axes along which the module is stacked."""
        return _parameters(self.module)[0].shape[: len(self.index)]

    @property
    def adapters(self) -> Mapping[str, LayerAdapter]:
        """The adapters of the layer by name."""
        return getattr(self.module, "adapters", {})

    @property
    def is_layer(self) -> bool:
        """Whether adapters can be attached to it."""
        return usable_weight(self.module) is not None

    @property
    def experts(self) -> tuple[int, ...]:
        """``(E,)`` of a layer with an axis of experts of its own, which its name has no number for.

        PyTorch has a parameter of that name, and no module.
        """
        kernel = usable_weight(self.module)
        if kernel is None or len(kernel.shape) != 1 + len(kernel.reduction) + len(kernel.output):
            return ()
        left = weight_shape(self.module)[len(self.index) : -2]
        return left if len(left) == 1 else ()

    @property
    def is_parameter(self) -> bool:
        """Whether this is a parameter in PyTorch, a stack of experts, and no module."""
        return bool(self.experts)

    @property
    def layout(self) -> Layout | None:
        """How its weight is laid out; None if it is not a layer."""
        if not self.is_layer:
            return None
        *batch, d_in, d_out = weight_shape(self.module)
        if experts := self.experts:
            return Layout("experts", d_in, d_out, experts=experts)
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

    @property
    def parameters(self) -> dict[str, str]:
        """The module's own parameters: PyTorch's name (``weight``, ``bias``) to Flax's."""
        own = [
            name
            for name, x in vars(self.module).items()
            if isinstance(x, nnx.Param) and not isinstance(x, AdapterParam)
        ]
        foreign = [name for name in own if name not in (*_WEIGHTS, "bias")]
        if foreign:
            raise ValueError(f"{path_string(self.path)}: {foreign} have no name in PyTorch.")
        return {"bias" if name == "bias" else "weight": name for name in own}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """PyTorch's shapes of its parameters."""
        layout = self.layout
        return {
            parameter: layout.weight_shape
            if layout and parameter == "weight"
            else (math.prod(self.variable(parameter).shape[len(self.index) :]),)
            for parameter in self.parameters
        }

    def variable(self, parameter: str) -> Any:
        """The variable of a parameter."""
        return getattr(self.module, self.parameters[parameter])

    def path_of(self, parameter: str) -> Path:
        """The path of a parameter in the Flax model."""
        return (*self.path, self.parameters[parameter])

    def read(self, parameter: str) -> np.ndarray:
        """A parameter in PyTorch's layout."""
        layout = self.layout
        if layout is None or parameter == "bias":
            return np.asarray(self.variable(parameter)[...])[self.index].reshape(-1)
        return layout.pack_weight(np.asarray(weight_matrix(self.module))[self.index])

    def write(self, parameter: str, tensor: np.ndarray) -> None:
        """Sets a parameter from PyTorch's tensor, in the model's own dtype."""
        layout, variable = self.layout, self.variable(parameter)
        with sharding_kept(variable):
            if layout is None or parameter == "bias":
                value = np.array(variable[...])
                value[self.index] = tensor.reshape(value[self.index].shape).astype(value.dtype)
                variable.set_value(jnp.asarray(value))
            else:
                matrices = np.array(weight_matrix(self.module))
                matrices[self.index] = layout.unpack_weight(tensor).astype(matrices.dtype)
                set_weight_matrix(self.module, jnp.asarray(matrices))


@contextlib.contextmanager
def sharding_kept(variable: Any) -> Iterator[None]:
    """Gives a variable, set inside from the host's arrays, the sharding that it had."""
    before = variable[...]
    yield
    if getattr(before, "committed", False):  # else it stays free to go where other arguments are
        variable.set_value(jax.device_put(variable[...], before.sharding))


def saved_layers(
    config: BaseConfig, slots: Mapping[str, Slot], tensors: Mapping[str, Tensors]
) -> list[Slot]:
    """Layers whose own weights are in an adapter's file, as those of ``modules_to_save``.

    Raises:
      UnsupportedConfigError: If a square weight may be of transformers' Conv1D or of a Linear.
    """
    given = {"weight", "base_layer.weight"}
    having = {m: slots[m] for m in tensors if m in slots and not given.isdisjoint(tensors[m])}
    layers = {module: layout for module, slot in having.items() if (layout := slot.layout)}
    for module, layout in layers.items():
        is_square = layout.kind == "linear" and layout.d_in == layout.d_out
        if config.fan_in_fan_out and "weight" in tensors[module] and is_square:
            raise UnsupportedConfigError(
                f"fan_in_fan_out=True with {module} in modules_to_save, a square weight, which "
                f"PyTorch may hold as [in, out] or [out, in]: unsupported. {MERGE_IN_PEFT}"
            )
    return [having[module] for module in layers]


def also_trained(module: Any) -> list[str]:
    """Flax's names of the module's parameters that `also_train` trains."""
    return [name for name, x in vars(module).items() if isinstance(x, AlsoTrained)]


def module_slots(model: Any, names: ModuleNames | None) -> dict[str, Slot]:
    """Every module of the model that PyTorch has, by its name there.

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
    name_of = (lambda path: (None, names(path))) if callable(names) else _by_template(names)
    inside = {"adapters", "adapter_groups", "own_values"}
    having = modules_by_path(model, lambda module: bool(_parameters(module)))
    modules = {path: module for path, module in having.items() if not inside & set(path)}
    found: dict[str, Slot] = {}
    for path, module in modules.items():
        order, template = name_of(path_string(path))
        if template is None:
            continue
        stack = _parameters(module)[0].shape[: template.count("{}")]
        for index in itertools.product(*map(range, stack)):
            name = template.format(*index)
            if name in found:
                both = f"{path_string(found[name].path)} and {path_string(path)}"
                raise ValueError(f"names: {both} are both called {name}.")
            found[name] = Slot(path, module, index, order)
    if not found:
        some = ", ".join(path_string(path) for path in list(modules)[:5])
        raise ValueError(f"names has none of the model's modules, which are {some}, ....")
    if not callable(names):
        # A model's own names are those of all models of its class.
        known = {} if of_model is None or callable(of_model) else of_model
        matches = lambda pattern: any(_pattern(pattern).match(path_string(p)) for p in modules)
        idle = [pattern for pattern in names if pattern not in known and not matches(pattern)]
        if idle:
            raise ValueError(
                f"names has {', '.join(map(repr, idle))}, which match no module of the model with "
                f"parameters of its own; {near(modules, idle[0])}"
            )
    return found


def _parameters(module: Any) -> list[Any]:
    return [x for x in vars(module).values() if isinstance(x, nnx.Param)]


def _by_template(names: Mapping[str, str]) -> Callable[[str], tuple[int | None, str | None]]:
    """A function of a path, to position and name: ``{}`` is a number, or none in a stack."""
    unequal = [
        f"{path!r}: {name!r}"
        for path, name in names.items()
        if not path.count("/{}") == path.count("{}") == name.count("{}")
    ]
    if unequal:
        raise ValueError(f"names has paths with other numbers of {{}} than names: {unequal}.")
    patterns = [(_pattern(path), name) for path, name in names.items()]

    def name_of(path: str) -> tuple[int | None, str | None]:
        for order, (pattern, name) in enumerate(patterns):
            if match := pattern.match(path):
                return order, name.format(*("{}" if n is None else n for n in match.groups()))
        return None, None

    return name_of


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path).replace(re.escape("/{}"), r"(?:/(\d+))?") + "$")


def tied_in_model(model: Any, slots: Mapping[str, Slot]) -> Tied | None:
    """The tied modules of a model whose configuration says that there are any."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return None
    tables = [name for name, slot in slots.items() if isinstance(slot.module, nnx.Embed)]
    return Tied(tables[0], "lm_head") if tables else None


def warn_of_heads(model: Any, slots: Mapping[str, Slot], modules: Iterable[str]) -> None:
    """Warns of modules whose table is changed and may be the head's, unknown to the model."""
    for module in modules:
        if _may_be_head(model, slots, module):
            warnings.warn(
                f"the adapter changes {module}. If its table is the head's too in this model, the "
                "head changes with it, as in PEFT only with ensure_weight_tying=True.",
                stacklevel=3,
            )


def _may_be_head(model: Any, slots: Mapping[str, Slot], module: str) -> bool:
    """Whether this is a table that may be the head's too: the model has no other head."""
    if module not in slots or not isinstance(slots[module].module, nnx.Embed):
        return False
    if hasattr(getattr(model, "config", None), "tie_word_embeddings"):
        return False
    rows = slots[module].shapes["weight"][0]
    others = (slot.shapes.get("weight") for other, slot in slots.items() if other != module)
    return all(shape is None or shape[0] != rows for shape in others)
