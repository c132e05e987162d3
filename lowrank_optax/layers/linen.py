"""The layers in Flax Linen."""

from collections.abc import Callable, Hashable, Mapping
import dataclasses
import functools
import re
from types import MappingProxyType
from typing import Any, ClassVar

from flax import linen as nn
import jax
import optax

from lowrank_optax.compat.flax import in_interceptor
from lowrank_optax.compat.jax import in_trace, new_trace
from lowrank_optax.layers.powerpropagation.reparameterisation import (
    Where,
    powerprop,
    powerprop_inverse,
)
from lowrank_optax.layers.randomized.linear import (
    call_sketched,
    check_dot_general,
    check_sketch,
    check_sketches,
)
from lowrank_optax.layers.randomized.sketch import Sketch
from lowrank_optax.matrices.paths import compiled_pattern, normalised_path
from lowrank_optax.matrices.rules import is_weight
from lowrank_optax.matrices.selection import Path, check_patterns, path_string
from lowrank_optax.modules.spec import BESIDE, without_beside

__all__ = ["PowerpropDense", "PowerpropModule", "Randomized", "RandomizedDense"]


class PowerpropDense(nn.Dense):
    r"""``nn.Dense`` with the kernel :math:`\theta |\theta|^{\alpha - 1}`.

    The parameter ``kernel`` is :math:`\theta`, ``[in, out]``, initialised such that the layer
    computes what ``nn.Dense`` with the same key does.

    Attributes:
      alpha: Exponent, at least 1; 1 is exactly ``nn.Dense``. The other attributes are those of
        ``nn.Dense``.

    Raises:
      ValueError: When called, if ``alpha`` is below 1.

    Example:
      >>> from flax import linen as nn
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> layer, x = lro.layers.linen.PowerpropDense(4, alpha=2.0), jnp.ones((2, 3))
      >>> outputs, _ = layer.init_with_output(jax.random.key(0), x)
      >>> plain, _ = nn.Dense(4).init_with_output(jax.random.key(0), x)
      >>> print(bool(jnp.allclose(outputs, plain, atol=1e-6)))
      True

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296.
    """

    alpha: float = 1.5

    @property
    def plain_weights(self) -> bool:
        """Whether the parameters are the weights, so that adapters may read and change them."""
        return self.alpha == 1

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Compute the outputs ``[..., out]`` from inputs ``[..., in]``."""
        run = _with_weights(nn.Dense.__call__, self, self.alpha, "(^|/)kernel$")
        return run(self, inputs)


class PowerpropModule(nn.Module):
    r"""Powerpropagation for the weights of any Linen module.

    The collection ``params`` holds :math:`\theta`, initialised such that the module computes what
    it would without; the module sees :math:`\theta |\theta|^{\alpha - 1}` instead. Its parameters
    are under ``module``.

    Attributes:
      module: Module to wrap.
      alpha: Exponent, at least 1.
      where: Parameters, as for `powerprop`, by their paths in ``params``.

    Raises:
      ValueError: When called, as `powerprop`.

    Example:
      >>> from flax import linen as nn
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> wrapped = lro.layers.linen.PowerpropModule(nn.Conv(3, (3, 3)), 1.5, where="kernel")
      >>> variables = wrapped.init(jax.random.key(0), jnp.ones((1, 4, 4, 2)))
      >>> print(jax.tree.map(jnp.shape, variables))
      {'params': {'module': {'bias': (3,), 'kernel': (3, 3, 2, 3)}}}

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296.
    """

    module: nn.Module
    alpha: float = 1.5
    where: Where = None

    @property
    def plain_weights(self) -> bool:
        """Whether the parameters are the weights, so that adapters may read and change them."""
        return self.alpha == 1

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with its effective weights."""
        call = lambda module, *args, **kwargs: module(*args, **kwargs)
        run = _with_weights(call, self, self.alpha, self.where)
        return run(self.module, *args, **kwargs)


def _with_weights(call: Any, module: nn.Module, alpha: float, where: Where) -> Any:
    """A method that sees the effective weights in ``params``; initial weights are stored as θ."""

    def to_weights(variables: Any) -> Any:
        # Arrays of adapters come along beside the weights, and pass as they are.
        is_beside = lambda path: BESIDE in normalised_path(path)
        theta = jax.tree_util.tree_map_with_path(
            lambda path, x: optax.MaskedNode() if is_beside(path) else x, variables
        )
        weights = powerprop(theta, alpha, where)
        is_hole = lambda x: isinstance(x, optax.MaskedNode)
        return jax.tree.map(lambda x, w: x if is_hole(w) else w, variables, weights)

    return nn.map_variables(
        call,
        "params",
        trans_in_fn=to_weights,
        trans_out_fn=lambda variables: powerprop_inverse(variables, alpha, where),
        init=module.is_initializing(),
    )


class RandomizedDense(nn.Dense):
    r"""``nn.Dense`` whose backward pass works from a sketch of its input.

    As `RandomizedLinear`, with the key of each call from ``make_rng("sketch")``: give ``apply`` an
    ``rngs={"sketch": key}`` with another key each step, and under ``nn.scan`` split it
    (``split_rngs={"params": True, "sketch": True}``). Without such a key, and if it is
    deterministic, the layer is exactly ``nn.Dense``. The parameters are those of ``nn.Dense``.

    Attributes:
      sketch: Kind and size of the sketch.
      deterministic: Whether the layer is the plain one; None leaves that to the call.
      rng_collection: Name of the random keys, ``sketch`` by default. The other attributes are those
        of ``nn.Dense``.

    Raises:
      TypeError: When called, if ``sketch`` is not a `Sketch`.
      ValueError: When called with a key, if the layer has its own ``dot_general``.

    Example:
      >>> from flax import linen as nn
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.layers.linen.RandomizedDense(4, sketch=lro.layers.Sketch(fraction=0.5))
      >>> x, key = jax.random.normal(jax.random.key(0), (8, 3)), jax.random.key(1)
      >>> variables = layer.init(key, x)
      >>> print(bool((layer.apply(variables, x) == nn.Dense(4).apply(variables, x)).all()))
      True
      >>> loss = lambda v: (layer.apply(v, x, rngs={"sketch": key}) ** 2).sum()
      >>> print(jax.tree.map(jnp.shape, jax.grad(loss)(variables)))
      {'params': {'bias': (4,), 'kernel': (3, 4)}}

    Reference:
      Bershatsky et al., 2022, https://arxiv.org/abs/2201.13195.
    """

    plain_weights: ClassVar[bool] = True
    """The call multiplies by the parameter itself: adapters may read and change it."""

    sketch: Sketch | None = None
    deterministic: bool | None = None
    rng_collection: str = "sketch"

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        deterministic: bool | None = None,
        *,
        valid: jax.Array | None = None,
    ) -> jax.Array:
        """Compute the outputs ``[..., features]`` from inputs ``[..., in]``.

        Args:
          inputs: Inputs of the layer.
          deterministic: Whether the layer is the plain one; overrides the attribute.
          valid: Rows that count, as for `RandomizedLinear`.
        """
        sketch = check_sketch(self.sketch)
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic or not self.has_rng(self.rng_collection):
            return nn.Dense.__call__(self, inputs)
        own = self.dot_general if self.dot_general_cls is None else self.dot_general_cls
        check_dot_general(own, "RandomizedDense")
        options = {"key": self.make_rng(self.rng_collection), "sketch": sketch, "valid": valid}
        return call_sketched(nn.Dense.__call__, self, inputs, **options)


@dataclasses.dataclass(frozen=True, eq=False)
class Randomized:
    """A Linen module whose ``nn.Dense`` layers work from sketches, as `RandomizedDense` does.

    The module and its variables are not changed: `apply` intercepts the calls of its layers, also
    of subclasses with the call of ``nn.Dense``. The keys come from ``make_rng("sketch")``: without
    such a key, or a single key, in ``rngs``, `apply` is that of the module. Under a scan with
    ``split_rngs={"sketch": False}`` all layers have one key. Call `apply` inside ``jax.jit``.

    Blocks under ``nn.jit`` share a trace if the same patterns are found in their layers. Within
    other ``nn.intercept_methods``, each call of `apply` traces them again. To tell blocks apart,
    `apply` with such a key puts a dictionary without arrays beside each ``kernel`` in ``params``: a
    function of ``nn.map_variables`` sees it, and must pass it on, as ``jax.tree.map`` does.

    Attributes:
      module: Any Linen module, or an object with its ``init`` and ``apply``.
      sketch: Sketch of all ``nn.Dense`` layers except output heads, or sketches by regular
        expressions found in their paths (``blocks/mlp/up``), of which the first that is found
        counts. It cannot be changed: ``dataclasses.replace(randomized, sketch=...)`` makes another
        object.

    Raises:
      TypeError: If a sketch is not a `Sketch`, or the module has no ``apply``.
      ValueError: If there is no pattern, or one is not a regular expression.

    Example:
      >>> from flax import linen as nn
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
      >>> x, key = jax.random.normal(jax.random.key(0), (16, 3)), jax.random.key(1)
      >>> variables = model.init(key, x)
      >>> sketches = {"layers_0": lro.layers.Sketch(fraction=0.25)}
      >>> randomized = lro.layers.linen.Randomized(model, sketches)
      >>> y = randomized.apply(variables, x, rngs={"sketch": key})
      >>> print(bool((y == model.apply(variables, x)).all()))
      True

    Reference:
      Bershatsky et al., 2022, https://arxiv.org/abs/2201.13195.
    """

    module: nn.Module | Any
    sketch: Sketch | Mapping[str, Sketch]
    _traces: "dict[Hashable, _Trace]" = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if not callable(getattr(self.module, "apply", None)):
            raise TypeError(f"module={self.module!r} must be a Linen module, or have its apply.")
        check_sketches(self.sketch)
        if isinstance(self.sketch, Mapping):
            for pattern in self.sketch:
                compiled_pattern("sketch", pattern)
            object.__setattr__(self, "sketch", MappingProxyType(dict(self.sketch)))

    def __reduce__(self) -> tuple[Any, ...]:
        sketch = dict(self.sketch) if isinstance(self.sketch, Mapping) else self.sketch
        return type(self), (self.module, sketch)  # a copy has traces of its own

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the variables of the module: ``module.init``."""
        return self.module.init(rngs, *args, **kwargs)

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Return ``module.init_with_output``."""
        return self.module.init_with_output(rngs, *args, **kwargs)

    def apply(self, variables: Any, *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        """Run ``module.apply`` with the same arguments, with randomized layers.

        Raises:
          ValueError: If no ``nn.Dense`` with a sketch was called, or a pattern matches none that
            was; if a scan around one does not have ``sketch`` in its ``split_rngs``, or it has its
            own ``dot_general``.
        """
        if rngs is not None and not isinstance(rngs, dict):
            rngs = {"params": rngs, "sketch": rngs}
        if rngs is None or "sketch" not in rngs:
            return self.module.apply(variables, *args, rngs=rngs, **kwargs)
        trace = self._trace_of((variables, args, rngs, kwargs))

        def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            layer = context.module
            is_dense = isinstance(layer, nn.Dense) and type(layer).__call__ is nn.Dense.__call__
            if not is_dense or context.method_name != "__call__":
                return call(*args, **kwargs)
            trace.paths[layer.path] = None
            run = functools.partial(call, *args, **kwargs)
            sketches = [*self._found(layer.path).values()]
            return _sketched(run, layer, sketches[0]) if sketches else run()

        # nn.jit traces a block again if its variables differ: make them tell its patterns. They are
        # in params, since a scan or nn.jit may leave out any other collection.
        name = f"lowrank_optax_patterns_{trace.number}"
        variables = {
            c: self._with_patterns(name, x) if c == "params" else x for c, x in variables.items()
        }
        with nn.intercept_methods(intercept), in_trace(trace.number):
            result = self.module.apply(variables, *args, rngs=rngs, **kwargs)
        self._check_found(trace.paths)
        if kwargs.get("mutable", False) is False:
            return result
        outputs, updates = result
        return outputs, without_beside(updates, name)

    def _trace_of(self, arguments: Any) -> "_Trace":
        """The trace of calls with such arguments: what they call may depend on them."""
        if in_interceptor():  # nothing says what the others do
            return _Trace()
        leaves, structure = jax.tree.flatten(arguments)
        kinds = ((type(x), x) if not hasattr(x, "dtype") else (x.shape, x.dtype) for x in leaves)
        try:
            return self._traces.setdefault((structure, *kinds), _Trace())
        except TypeError:  # an argument is not hashable
            return _Trace()

    def _check_found(self, paths: Mapping[Path, None]) -> None:
        if not paths:
            raise ValueError("the module called no nn.Dense, so nothing has a sketch.")
        if isinstance(self.sketch, Mapping):
            check_patterns("sketch", self.sketch, paths, "nn.Dense layer")
        elif not any(map(self._found, paths)):
            names = ", ".join(map(path_string, paths))
            raise ValueError(
                f"the nn.Dense layers called are only output heads ({names}), which one sketch "
                "leaves out: give sketches by patterns."
            )

    def _found(self, path: Path) -> dict[str, Sketch]:
        """The sketches of a layer by patterns that are found in its path; the first counts."""
        name = path_string(path)
        if isinstance(self.sketch, Mapping):
            return {p: sketch for p, sketch in self.sketch.items() if re.search(p, name)}
        return {"": self.sketch} if is_weight(f"{name}/kernel") else {}

    def _with_patterns(self, name: str, params: Mapping[str, Any], path: Path = ()) -> Any:
        """The parameters, and beside each kernel the patterns found, as empty dictionaries."""
        new = {
            key: self._with_patterns(name, x, (*path, key)) if isinstance(x, Mapping) else x
            for key, x in params.items()
        }
        return {**new, name: {p: {} for p in self._found(path)}} if "kernel" in params else new


@dataclasses.dataclass(frozen=True)
class _Trace:
    """Number of a trace, and the paths of the ``nn.Dense`` layers that were called in it."""

    number: int = dataclasses.field(default_factory=new_trace)
    paths: dict[Path, None] = dataclasses.field(default_factory=dict)


def _sketched(call: Callable[[], Any], layer: nn.Dense, sketch: Sketch) -> Any:
    name = path_string(layer.path)
    if not layer.has_rng("sketch"):
        raise ValueError(
            f"{name} gets no key: give the scan or vmap around it "
            'split_rngs={"params": True, "sketch": True}.'
        )
    own = layer.dot_general
    check_dot_general(own if layer.dot_general_cls is None else layer.dot_general_cls, name)

    def run(sketched: nn.Dense) -> jax.Array:
        # The call is bound to the layer, which belongs to this apply alone.
        vars(layer)["dot_general"] = sketched.dot_general
        try:
            return call()
        finally:
            vars(layer)["dot_general"] = own

    return call_sketched(run, layer, key=layer.make_rng("sketch"), sketch=sketch, valid=None)
