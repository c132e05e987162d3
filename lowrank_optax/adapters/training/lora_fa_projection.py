"""LoRA-FA's update of the second factor: the one whose change of the weight fits best."""

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.adapters.base import Arrays
from lowrank_optax.adapters.methods.lora_fa import LoRAFA
from lowrank_optax.matrices.explicit_sharding import product
from lowrank_optax.matrices.flax_layers import is_nnx_module
from lowrank_optax.matrices.orthonormal import in_turn
from lowrank_optax.matrices.paths import path_string

Factors: TypeAlias = Mapping[str, tuple[jax.Array, Any]]


class LoRAFAProjectionState(NamedTuple):
    """State of `lora_fa_projection`.

    Attributes:
      inverse: ``(s² AᵀA)⁻¹ [*batch, r, r]``, float32, for each ``B`` of the factors;
        ``MaskedNode`` for other leaves.
    """

    inverse: optax.Params


def lora_fa_projection(
    factors: Factors, *, damping: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    r"""Gradients of ``B`` whose change of the weight is closest to the weight's own gradient.

    With :math:`D = \partial L / \partial W`, of which the gradient :math:`s A^\top D` of ``B`` is
    all that is known,

    .. math::
      g_B = \arg\min_g \lVert s A g - D \rVert_F
          = \frac{1}{s^2} (A^\top A)^{-1} \, \frac{\partial L}{\partial B}.

    Chain it before an optimizer: with ``optax.sgd`` the weight changes by
    :math:`-\eta P_A D`, :math:`P_A` projecting on the columns of ``A``, whatever ``s`` and the
    scale of ``A``. Adam's updates do not depend on the scale of gradients: only the mixing of rows
    by the inverse is left. Other leaves than ``B`` of the factors pass unchanged.

    ``A`` is constant, so the inverse is computed once, into the state (``r²`` floats for each).
    Directions that ``A`` lacks (a rank above ``d_in``, columns of zeros) get no gradient.

    Args:
      factors: The ``A [*batch, d_in, r]`` of each ``B`` and its scale ``s`` (a number, or one for
        each row, ``[*batch, r]``), by the path of the ``B`` without its last name, or the end of
        that path; `lora_fa_factors` collects them.
      damping: Tikhonov damping, relative to the mean of the diagonal of :math:`A^\top A`.

    Returns:
      A transformation with the state `LoRAFAProjectionState`. It computes in float32; gradients
      keep their dtypes.

    Raises:
      ValueError: If ``damping`` is negative; in ``init``, if no leaf is a ``B`` of the factors, or
        shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.adapters.lora_fa_projection({"query": (jnp.array([[2.0], [0.0]]), 3.0)})
      >>> params = {"query": {"B": jnp.zeros((1, 1))}}
      >>> g, _ = tx.update({"query": {"B": jnp.array([[6.0]])}}, tx.init(params))
      >>> print(f"{g['query']['B'][0, 0]:.4f}")
      0.1667

    Reference:
      The later version of Zhang et al., 2023, https://arxiv.org/abs/2308.03303, as in
      ``LoraFAOptimizer`` of Hugging Face PEFT.
    """
    if isinstance(damping, int | float) and not damping >= 0:
        raise ValueError(f"damping={damping!r} must not be negative.")

    def init_fn(params: optax.Params) -> LoRAFAProjectionState:
        found = []

        def inverse(path: Any, b: jax.Array) -> Any:
            key = _key(path_string(path), factors)
            if key is None:
                return optax.MaskedNode()
            found.append(key)
            a, scale = factors[key]
            if a.ndim != b.ndim or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
                raise ValueError(
                    f"factors[{key!r}] has A of shape {a.shape} for a B of shape {b.shape}: "
                    "[*batch, d_in, r] and [*batch, r, d_out] must agree."
                )
            return _inverse(a, scale, damping)

        state = LoRAFAProjectionState(jax.tree_util.tree_map_with_path(inverse, params))
        if jax.tree.leaves(params) and not found:
            paths = [path_string(path) for path, _ in jax.tree.leaves_with_path(params)]
            raise ValueError(
                f"no parameter is the B of one of the factors: these are of {list(factors)[:3]}, "
                f"parameters are {paths[:3]}."
            )
        return state

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LoRAFAProjectionState]:
        del params, extra_args

        def projected(g: jax.Array, inverse: Any) -> jax.Array:
            if isinstance(inverse, optax.MaskedNode):
                return g
            return product("...rk,...kn->...rn", inverse, g.astype(jnp.float32)).astype(g.dtype)

        return jax.tree.map(projected, updates, state.inverse), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def lora_fa_factors(source: Any, method: LoRAFA | None = None) -> dict[str, tuple[jax.Array, Any]]:
    """The frozen ``A`` and the scales of all LoRA-FA adapters, for `lora_fa_projection`.

    Args:
      source: A Flax NNX model with adapters attached; or a tree of their frozen arrays, with the
        paths of the trained tree and ``A`` instead of ``B``: in Linen
        ``variables["adapter_constants"]["default"]``.
      method: The adapter that a tree belongs to. Ranks are read from the arrays, values of
        ``alpha`` are not: collect layers of another ``alpha`` apart and join the dictionaries.

    Returns:
      ``{path: (A [*batch, d_in, r], s [*batch, r])}``.

    Raises:
      ValueError: If there is no such adapter, or ``method`` is missing.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> frozen = {"query": {"A": jnp.ones((4, 2))}}
      >>> factors = lro.adapters.lora_fa_factors(frozen, lro.adapters.LoRAFA(rank=2, alpha=6))
      >>> print(factors["query"][1])
      [3. 3.]
    """
    if is_nnx_module(source):
        from lowrank_optax.adapters.adapted_layers import adapted_layers

        found = {
            "/".join((*path, "adapters", name, "arrays")): _scaled(adapter.method, adapter.p())
            for path, layer in adapted_layers(source).items()
            for name, adapter in layer.adapters.items()
            if isinstance(adapter.method, LoRAFA)
        }
    elif method is None:
        raise ValueError("method=None: say to which LoRAFA the tree of arrays belongs.")
    else:
        leaves = {path_string(p): x for p, x in jax.tree.leaves_with_path(source)}
        found = {}
        for path, a in leaves.items():
            owner, name = _split(path)
            if name == "A":
                arrays = {_split(k)[1]: x for k, x in leaves.items() if _split(k)[0] == owner}
                # Patterns may have given a layer another rank.
                found[owner] = _scaled(dataclasses.replace(method, rank=a.shape[-1]), arrays)
    if not found:
        raise ValueError("there is no LoRA-FA adapter: attach LoRAFA(...) first.")
    return found


def _scaled(method: LoRAFA, p: Arrays) -> tuple[jax.Array, Any]:
    """``A`` and the scale of each of its columns."""
    a = p["A"]
    return a, method.scaled(p, jnp.ones((*a.shape[:-2], a.shape[-1], 1)))[..., 0]


def _split(path: str) -> tuple[str, str]:
    owner, _, name = path.rpartition("/")
    return owner, name


def _key(path: str, factors: Factors) -> str | None:
    """Which of the factors the parameter at a path is the ``B`` of: that with the longest path."""
    owner, name = _split(path)
    if name != "B":
        return None
    names = owner.split("/") if owner else []
    endings = ("/".join(names[start:]) for start in range(len(names) + 1))
    return next((ending for ending in endings if ending in factors), None)


def _inverse(a: jax.Array, scale: Any, damping: float) -> jax.Array:
    """``(s AᵀA s + damping)⁻¹``, as a pseudo-inverse: a float32 cannot see so little damping."""
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (*a.shape[:-2], a.shape[-1]))
    columns = a.astype(jnp.float32) * scale[..., None, :]
    gram = product("...dk,...dl->...kl", columns, columns)
    mean = jnp.mean(jnp.diagonal(gram, axis1=-2, axis2=-1), axis=-1)[..., None, None]
    damped = gram + damping * mean * jnp.eye(gram.shape[-1])
    return in_turn(lambda a: jnp.linalg.pinv(a, hermitian=True), damped)
