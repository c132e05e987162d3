"""A function of one number, whose backward pass keeps a few bits of each element."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, TypeAlias

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.typing import ArrayLike

from lowrank_optax.activations import codebooks
from lowrank_optax.activations.step_function import Codebook
from lowrank_optax.quantization.packing import PackingName, pack, packed_bytes, unpack

CODES = "few_bit_codes"
"""The name of what is kept, for ``jax.checkpoint_policies.save_only_these_names``."""

Pointwise: TypeAlias = Callable[[jax.Array], jax.Array]


def few_bit(
    fn: Pointwise,
    bits: int = 3,
    *,
    codebook: Codebook | None = None,
    density: Any = "uniform",
    packing: PackingName = "auto",
) -> "FewBit":
    r"""``fn``, whose backward pass keeps ``bits`` bits of each element and not ``x``.

    With the levels :math:`q_c` that stand for the derivative, and a code for each element,

    .. math::
      y = f(x), \qquad c = c(x) \in \{0, \dots, 2^b - 1\}, \qquad \bar x = \bar y \cdot q_c.

    The forward pass is ``fn`` itself. What is kept for the backward pass is the
    packed codes alone: one array or a few, named ``"few_bit_codes"`` for the policies of
    ``jax.checkpoint``. Works under ``jit``, ``vmap``, ``scan``, ``jax.checkpoint`` and sharding. A
    second derivative, and forward mode (``jax.jvp``, ``jax.jacfwd``), raise: the codes know nothing
    of them.

    Equal arguments give the same function, so that compiled programs are found again; of a lambda
    written out anew each time they are not equal, so call this once, outside the training step.

    Args:
      fn: A function of one number, applied elementwise: floating point of any shape and dtype to
        the same. Closed over no traced array.
      bits: 1 to 8.
      codebook: What stands in for the derivative; ``bits`` and ``density`` are then ignored.
      density: Of the inputs, for which the codebook is the best one: see `codebook`.
      packing: How codes are laid out: ``"auto"``, ``"planes"``, ``"nibbles"``, ``"uint4"`` or
        ``"uint8"``; the last two are elementwise, so that sharded arrays exchange nothing.

    Returns:
      A function of one array. It raises a TypeError where that is not of floating point.

    Raises:
      TypeError: If ``fn`` is no function.
      ValueError: If ``bits``, ``density`` or ``packing`` is none.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> gelu = lro.activations.few_bit(jax.nn.gelu, bits=4)
      >>> x = jnp.array([-3.0, -0.5, 0.0, 0.5, 3.0])
      >>> print(bool(jnp.all(gelu(x) == jax.nn.gelu(x))))
      True
      >>> y, backward = jax.vjp(gelu, x)
      >>> print([kept.dtype.name for kept in jax.tree.leaves(backward)])
      ['uint8']

    Reference:
      Novikov et al., Few-Bit Backward: Quantized Gradients of Activation Functions for Memory
      Footprint Reduction, ICML 2023, https://arxiv.org/abs/2202.00441, Algorithm 1. The coding is
      better than the paper's: see `codebook`.
    """
    if not callable(fn):
        raise TypeError(f"fn={fn!r} must be a function of one array.")
    if codebook is None:
        codebook = codebooks.codebook(fn, bits, density=density)
    packed_bytes((), codebook.bits, packing)  # raises where there is no such packing
    return _applied(fn, codebook, packing)


@dataclasses.dataclass(frozen=True)
class FewBit:
    """What `few_bit` returns: hashable and equal by what it was made of."""

    fn: Pointwise
    codebook: Codebook
    packing: PackingName

    @property
    def __name__(self) -> str:
        return f"few_bit_{name_of(self.fn)}"

    def __repr__(self) -> str:
        return f"few_bit({name_of(self.fn)}, bits={self.codebook.bits})"

    def __call__(self, x: ArrayLike) -> jax.Array:
        """``fn(x)``."""
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{self!r} needs floating point; x has the dtype {x.dtype}.")
        y = apply_few_bit(self.fn, self.codebook, self.packing, x)
        if (y.shape, y.dtype) != (x.shape, x.dtype):
            made = f"{x.dtype}{list(x.shape)} into {y.dtype}{list(y.shape)}"
            raise TypeError(f"fn must keep shape and dtype; {name_of(self.fn)} made {made}.")
        return y


_applied = functools.lru_cache(maxsize=1024)(FewBit)


def name_of(fn: Pointwise) -> str:
    """What a function is called, through ``functools.partial``."""
    return getattr(fn, "__name__", None) or (
        name_of(fn.func) if isinstance(fn, functools.partial) else type(fn).__name__
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def apply_few_bit(fn: Pointwise, book: Codebook, packing: PackingName, x: jax.Array) -> jax.Array:
    """``fn(x)``, whose backward pass keeps the codes of ``x`` alone.

    Args:
      fn: Elementwise; hashable, closed over no traced array.
      book: What stands in for its derivative.
      packing: Of the codes; see `pack`.
      x: Any shape, floating point.
    """
    return fn(x)


def _forward(
    fn: Pointwise, book: Codebook, packing: PackingName, x: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    packed = pack(_codes(fn, book, x), book.bits, packing)
    return fn(x), tuple(checkpoint_name(part, CODES) for part in packed)


def _backward(
    fn: Pointwise,
    book: Codebook,
    packing: PackingName,
    packed: tuple[jax.Array, ...],
    gradient: jax.Array,
) -> tuple[jax.Array]:
    codes = unpack(packed, gradient.shape, book.bits, packing)
    wide = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    return ((wide * book.decode(codes)).astype(gradient.dtype),)


apply_few_bit.defvjp(_forward, _backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _codes(fn: Pointwise, book: Codebook, x: jax.Array) -> jax.Array:
    """The codes of ``x``, which refuse to be differentiated: integers would say 0, silently."""
    return book.encode(x)


@_codes.defjvp
def _no_second_derivative(fn: Pointwise, book: Codebook, primals: Any, tangents: Any) -> Any:
    name = name_of(fn)
    raise NotImplementedError(
        f"few-bit {name} has no second derivatives: its backward pass knows a few bits of x only. "
        f"Use plain {name} where you need a Hessian."
    )
