"""Where adapters sit in a Flax Linen model: found by watching one abstract call of it.

Linen's layers exist only while the model runs, so `watch` records those that a call goes through:
their path, which parameter is their weight, and which of its axes are inputs and outputs.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
from typing import Any, NamedTuple

from flax import linen as nn
import jax

from lowrank_optax.adapters.calls import einsum_equation
from lowrank_optax.compat.flax import is_lifted_call
from lowrank_optax.compat.jax import in_fresh_trace
from lowrank_optax.matrices.flax_layers import Kernel, kernel_axes
from lowrank_optax.matrices.views import WeightDimensionNumbers
from lowrank_optax.modules.spec import usable_weight


class LinenSite(NamedTuple):
    """A layer that an adapter can be attached to.

    Attributes:
      scope: Where its parameters lie in the collection ``params``.
      weight: Name of its weight there.
      kernel: Which axes of the weight are inputs and outputs, and its shape in one layer.
      embedding: Whether rows of it are looked up.
      module: The layer, unbound.
    """

    scope: tuple[str, ...]
    weight: str
    kernel: Kernel
    embedding: bool
    module: nn.Module

    @property
    def spec(self) -> WeightDimensionNumbers:
        """Its dimension numbers, counted from the end, so that they hold when it is stacked."""
        return from_the_end(self.kernel)


Sites = dict[tuple[str, ...], LinenSite]


def from_the_end(kernel: Kernel) -> WeightDimensionNumbers:
    """Dimension numbers that fit the weight of one layer and of a stack of them."""
    ndim = len(kernel.shape)
    return WeightDimensionNumbers(
        tuple(axis - ndim for axis in kernel.reduction),
        tuple(axis - ndim for axis in kernel.output),
    )


@contextlib.contextmanager
def watch(found: dict[tuple[str, ...], LinenSite | None]) -> Iterator[None]:
    """While open, every layer that is called is put into ``found``, by scope and weight.

    A weight used in two ways (its axes once inputs and once outputs) is None there: no one adapter
    fits both.
    """

    def interceptor(
        next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        y = next_fun(*args, **kwargs)
        read = read_call(context, args, kwargs)
        if read is not None:
            kernel, module = read[0], context.module
            embedding = isinstance(module, nn.Embed)
            unbound = module.clone(parent=None, name=None)
            site = LinenSite(tuple(module.path), kernel.path[0], kernel, embedding, unbound)
            before = found.setdefault((*site.scope, site.weight), site)
            if before is not None and before.kernel[1:4] != kernel[1:4]:
                found[(*site.scope, site.weight)] = None
        return y

    with nn.intercept_methods(interceptor):
        yield


def sites_of(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sites:
    """The layers that a call goes through; nothing is computed.

    Args:
      run: The model.
      args: Its arguments: arrays, ``jax.ShapeDtypeStruct`` or anything else.
      kwargs: Likewise.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    # Only shapes become tracers: a flag must stay one that Python can read.
    shapes = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)}

    def call(shaped: dict[int, Any]) -> Any:
        whole = [shaped.get(i, x) for i, x in enumerate(leaves)]
        own_args, own_kwargs = jax.tree.unflatten(tree, whole)
        return run(*own_args, **own_kwargs)

    found: dict[tuple[str, ...], LinenSite | None] = {}
    # Under nn.jit a layer that has been traced before would not run: in another context it does.
    with watch(found), in_fresh_trace():
        jax.eval_shape(call, shapes)
    return named(found)


def named(found: Mapping[tuple[str, ...], LinenSite | None]) -> Sites:
    """The layers by path: that of the module, and the weight's name if it is not the only one."""
    usable = [site for site in found.values() if site is not None]
    scopes = [site.scope for site in usable]
    return {s.scope if scopes.count(s.scope) == 1 else (*s.scope, s.weight): s for s in usable}


def read_call(
    context: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Kernel, jax.Array] | None:
    """The weight of the layer whose method has just been called; None if it is no such layer.

    Returns:
      What is known of the weight, with its shape here, and the weight itself.
    """
    module = context.module
    # A lifted call runs the layer proper, which is watched too: there the weight has its own axes.
    if context.method_name != "__call__" or module.scope is None or is_lifted_call(type(module)):
        return None
    kernel = usable_weight(module)
    if kernel is None:
        return _called_einsum(module, args, kwargs)
    weight = nn.meta.unbox(module.get_variable("params", kernel.path[0]))
    if weight is None or weight.ndim != len(kernel.shape):
        return None
    return kernel._replace(shape=tuple(weight.shape)), weight


def _called_einsum(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Kernel, jax.Array] | None:
    """The weight of a layer that was called with an equation, as Flax's and Gemma's einsums are."""
    try:
        equation = einsum_equation(module, args, kwargs)
    except AttributeError:
        return None
    if not isinstance(equation, str) or equation.count(",") != 1:
        return None
    own = _own_weight(module)
    if own is None:
        return None
    name, weight = own
    letters = equation.replace(" ", "").split("->")[0].split(",")[1]
    if len(letters) != weight.ndim or "." in letters:
        return None
    reduction, output = kernel_axes(equation, weight.ndim)
    if not reduction or not output:
        return None
    return Kernel((name,), tuple(weight.shape), reduction, output), weight


def _own_weight(module: nn.Module) -> tuple[str, jax.Array] | None:
    """The one array of a module's own that can be its weight.

    Modules that share a scope see each other's arrays: then one of the module's fields says which
    is meant (Gemma's ``weight_name``).
    """
    boxed = nn.meta.unbox(dict(module.variables.get("params", {})))
    arrays = {n: x for n, x in boxed.items() if getattr(x, "ndim", 0) > 1}
    fields = [x for x in vars(module).values() if isinstance(x, str) and x in arrays]
    names = fields or (["kernel"] if "kernel" in arrays else list(arrays))
    return (names[0], arrays[names[0]]) if len(names) == 1 else None
