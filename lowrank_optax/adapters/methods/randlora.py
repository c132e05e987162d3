"""RandLoRA: a change of full rank, as a sum of shared random bases with trained scales."""

from collections.abc import Hashable, Sequence
import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.adapters.base import Adapter, AdapterParams, Arrays, Weights, product
from lowrank_optax.adapters.low_rank import check_dropout, check_rank, to_float32
from lowrank_optax.adapters.operands import Operand, Rows

Bases = Literal["dense", "sparse", "very_sparse"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLoRA(Adapter):
    r"""Random bases that all layers share, and trained scales: a change of full rank.

    With :math:`d` the smaller side of the weight, :math:`D` the larger one and
    :math:`n = \lceil d / r \rceil`:

    .. math::
      P = V U, \qquad U_{(k,j)} = \lambda_{kj}\, a_k \odot \gamma_j, \qquad
      \Delta W = s P^\top \text{ if } d_\text{in} \le d_\text{out}, \text{ else } s P .

    Row :math:`k n + j` of :math:`U \in \mathbb{R}^{r n \times d}` is made of the random row
    :math:`a_k`; column :math:`j r + k` of :math:`V \in \mathbb{R}^{D \times n r}` is column
    :math:`k` of the random basis :math:`j`. So the two are not paired by equal :math:`(k, j)`, as
    in the paper's sum, but by position, as in PEFT: statistically the same, with other numbers.

    Parameters of a stack ``[L, d_in, d_out]``: ``lambda [L, r, n]``, zero, and ``gamma [L, n, d]``,
    ``1 / max(n, d)``. Until the second update all rows of ``gamma`` are equal, and the rank of the
    change is at most ``r``. Shared and not trained: ``A [r, 1, d]`` and ``B [D, n, r]``, of which
    each layer reads the first rows and columns. One pair serves all layers of a rank: its ``d`` is
    the largest of their smaller sides, and its ``D`` their largest side.

    Args:
      rank: Rank ``r`` of a basis. A smaller one trains more numbers, ``d²/r + d`` for each weight.
      alpha: The change is scaled by ``s = alpha / rank``; None for ``20 * rank``, as in PEFT.
      bases: Entries of ``A`` and ``B``: ``"dense"``, uniform; ``"sparse"``, a third is 1 or -1 and
        the others 0; ``"very_sparse"``, the same with ``1/sqrt(d)`` instead of a third. Each array
        is divided by its standard deviation.
      dropout: Fraction of inputs dropped, in training.
      param_dtype: Dtype of all arrays.

    Raises:
      TypeError: If `rank` is not an int.
      ValueError: If an option is out of its range; if the layers are so small that all entries of a
        basis are equal; in a call, if ``A`` or ``B`` is smaller than the layer needs.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> method = lro.adapters.RandLoRA(rank=1, alpha=1)
      >>> p = {"A": jnp.array([[[1.0, -1.0]]]), "lambda": jnp.array([[0.5, 1.0]])}
      >>> p |= {"B": jnp.array([[[1.0], [2.0]], [[0.0], [1.0]], [[-1.0], [1.0]]])}
      >>> p |= {"gamma": jnp.array([[1.0, 1.0], [2.0, 1.0]])}
      >>> print(method.delta(p, jnp.zeros((3, 2))))
      [[ 4.5 -2.5]
       [ 2.  -1. ]
       [ 1.5 -0.5]]

    Reference:
      Albert et al., RandLoRA, 2025, https://arxiv.org/abs/2502.00987. Scale, initial values and
      pairing are those of https://github.com/huggingface/peft.
    """

    rank: int = 32
    alpha: float | None = None
    bases: Bases = "dense"
    dropout: float = 0.0
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        """Checks the options."""
        check_rank(self.rank)
        check_dropout(self.dropout)
        if self.bases not in get_args(Bases):
            raise ValueError(f"bases={self.bases!r} must be one of {get_args(Bases)}.")

    @property
    def shared(self) -> frozenset[str]:
        """``A`` and ``B``."""
        return frozenset({"A", "B"})

    def group(self, path: str, shape: tuple[int, int]) -> Hashable:
        """All weights of one rank share the bases."""
        return "bases", self.rank

    def init_shared(self, key: jax.Array, members: Sequence[Weights]) -> AdapterParams:
        """Random ``A`` and ``B`` that are large enough for every member."""
        d = max(min(weights.shape[-2:]) for weights in members)
        largest = max(max(weights.shape[-2:]) for weights in members)
        of_first, of_second = jax.random.split(key)
        a = self._draw("A", of_first, (self.rank, 1, d), d)
        b = self._draw("B", of_second, (largest, self._count(d), self.rank), d)
        return AdapterParams({}, {"A": a, "B": b})

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """``lambda`` zero and ``gamma`` constant."""
        del key, shared, embedding
        layers, d = weights.shape[0], min(weights.shape[-2:])
        count = self._count(d)
        gamma = jnp.full((layers, count, d), 1 / max(count, d), self.param_dtype)
        zeros = jnp.zeros((layers, self.rank, count), self.param_dtype)
        return AdapterParams({"lambda": zeros, "gamma": gamma}, {})

    def branch(
        self,
        p: Arrays,
        x: Operand,
        *,
        y: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Two products; what is as large as the weight is computed again for the backward pass.

        That saves ``x`` if ``d_in <= d_out``, else the ``r n`` numbers ``x V`` of each token.
        """
        del y, bias
        shape = weight.shape[-2:]
        if key is not None and self.dropout:
            x = x.drop(key, self.dropout)
        # Closed over, not passed: an operand is not a pytree.
        first = jax.checkpoint(lambda p: x @ self._factors(p, shape)[0])
        second = jax.checkpoint(lambda p, inner: Rows(inner) @ self._factors(p, shape)[1])
        return second(dict(p), first(dict(p)))

    def delta(self, p: Arrays, weight: jax.Array) -> jax.Array:
        """The product of the scaled bases; see `Adapter.delta`."""
        return product(*self._factors(p, weight.shape[-2:]))

    def _factors(self, p: Arrays, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Two factors ``[..., d_in, r n]`` and ``[..., r n, d_out]``, float32, scaled."""
        d, largest = min(shape), max(shape)
        count = self._count(d)
        of_a, of_b = p["A"].shape[-3:], p["B"].shape[-3:]
        has_rank = of_a[0] == of_b[2] == self.rank
        if not (has_rank and of_a[2] >= d and of_b[0] >= largest and of_b[1] >= count):
            raise ValueError(
                f"the shared arrays A and B have shapes {of_a} and {of_b}: a weight {list(shape)} "
                f"needs {(self.rank, 1, d)} and {(largest, count, self.rank)}, or more than {d}, "
                f"{largest} and {count}."
            )
        scales, gamma, a, b = to_float32(p, "lambda", "gamma", "A", "B")
        scales = scales * (20.0 if self.alpha is None else self.alpha / self.rank)
        u = scales[..., None] * a[..., :d] * gamma[..., None, :, :]  # [..., r, n, d]
        u = u.reshape(*u.shape[:-3], -1, d)
        v = b[..., :largest, :count, :]
        v = v.reshape(*v.shape[:-3], largest, -1)
        return (u.mT, v.mT) if shape[0] <= shape[1] else (v, u)

    def _count(self, d: int) -> int:
        """Number of bases for a smaller side ``d``."""
        return math.ceil(d / self.rank)

    def _draw(self, name: str, key: jax.Array, shape: tuple[int, ...], d: int) -> jax.Array:
        if self.bases == "dense":
            drawn = jax.random.uniform(key, shape, minval=-1)
        else:
            nonzero = 1 / (3.0 if self.bases == "sparse" else math.sqrt(d))
            uniform = jax.random.uniform(key, shape)
            drawn = jnp.float32(uniform > 1 - nonzero / 2) - jnp.float32(uniform < nonzero / 2)
        deviation = jnp.std(drawn, ddof=1)
        if not isinstance(deviation, jax.core.Tracer) and not deviation > 0:
            raise ValueError(
                f"all {math.prod(shape)} entries of the shared array {name!r} {shape} drawn with "
                f"bases={self.bases!r} are equal: the layers are too small for it."
            )
        return (drawn / deviation).astype(self.param_dtype)
