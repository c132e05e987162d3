"""Few-bit nonlinearities in a Flax Linen model: a facade around a module that stays as it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn
import jax

from lowrank_optax.activations.calls import CallsWhere, Replacement
from lowrank_optax.activations.calls_report import CallsReport
from lowrank_optax.activations.codebooks import DensityName
from lowrank_optax.activations.finding import DEFAULT_NAMES, Functions
from lowrank_optax.quantization.packing import PackingName

__all__ = ["FewBit"]


class FewBit:
    """A Linen module whose nonlinearities are few-bit, wherever its code calls them.

    The module and its variables are not touched: `apply` runs ``module.apply`` as `few_bit_calls`
    does any function, with the same results. So nonlinearities are found in the module's own lines,
    in modules inside, and in those lifted by ``nn.scan``, ``nn.remat``, ``nn.vmap`` or ``nn.jit``.
    (An interceptor of ``nn.intercept_methods`` sees calls of modules only.)

    Each `apply` traces the module, so call it inside ``jax.jit``.

    Args:
      module: Any Linen module, or an object with its ``init`` and ``apply`` such as
        ``lro.adapters.linen.Adapted``.
      bits: 1 to 8; see `few_bit_calls`.
      where: Calls to replace: a regular expression (or a list) found in the path of the module that
        makes the call, which starts with the class of the outermost, and in the call's source, as
        a report prints both: ``Decoder/blocks/mlp MLP.__call__ decoder.py:55``; None for all.
      functions: Functions to look for; see `few_bit_calls`.
      density: See `few_bit_calls`.
      packing: See `few_bit`.

    Raises:
      ValueError: If an option is not one of its choices, or a pattern is not a regular expression.
      TypeError: If ``module`` has no ``apply``.

    Example:
      >>> from flax import linen as nn
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> model = nn.Sequential([nn.Dense(8), nn.silu, nn.Dense(2)])
      >>> few = lro.activations.linen.FewBit(model, bits=4)
      >>> x = jnp.ones((16, 4))
      >>> variables = few.init(jax.random.key(0), x)
      >>> print(bool((few.apply(variables, x) == model.apply(variables, x)).all()))
      True
      >>> row = few.report(variables, x).rows[0]
      >>> print(row.function, row.shape, row.bytes_now, row.bytes_then, row.saved_for)
      silu (16, 8) 1536 64 ('product',)

    Reference:
      Novikov et al., Few-Bit Backward, 2023, https://arxiv.org/abs/2202.00441.
    """

    def __init__(
        self,
        module: nn.Module | Any,
        bits: int = 3,
        where: CallsWhere = None,
        *,
        functions: Functions = DEFAULT_NAMES,
        density: DensityName = "uniform",
        packing: PackingName = "auto",
    ) -> None:
        if not callable(getattr(module, "apply", None)):
            raise TypeError(f"module={module!r} must be a Linen module, or have its apply.")
        self.module = module
        self.replacement = Replacement.of(bits, functions, where, density, packing)

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """The variables: what ``module.init`` returns."""
        return self.module.init(rngs, *args, **kwargs)

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What ``module.init_with_output`` returns."""
        return self.module.init_with_output(rngs, *args, **kwargs)

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """What ``module.apply`` returns for the same arguments.

        Raises:
          ValueError: If nothing is found to replace; the message names what was looked for.
        """
        return self.replacement.run(self._apply, (variables, *args), kwargs)[0]

    def report(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        wrt: str | Sequence[str] = "params",
        **kwargs: Any,
    ) -> CallsReport:
        """The calls that are found, what they save, and whether few bits pay; nothing is computed.

        Args:
          variables: Variables of the model, or their shapes.
          args: Arguments of the model: arrays or ``jax.ShapeDtypeStruct``.
          wrt: Collections that are trained.
          kwargs: Keyword arguments of `apply`.

        Raises:
          ValueError: If nothing is found to replace.
        """
        names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
        marks = {k: jax.tree.map(lambda _, k=k: k in names, x) for k, x in variables.items()}
        others = jax.tree.map(lambda _: False, (args, kwargs))
        args, trained = (variables, *args), ((marks, *others[0]), others[1])
        return self.replacement.report(self._apply, args, kwargs, trained)

    def _apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self.module.apply(variables, *args, **kwargs)
