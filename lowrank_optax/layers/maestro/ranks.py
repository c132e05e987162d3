"""The ranks of a model's Maestro layers: the current ones, those of a step, and when they fall."""

from collections.abc import Mapping
import difflib
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lowrank_optax.layers.maestro.ordered import check_prefix, group_norms
from lowrank_optax.layers.maestro.ordered_layer import MaestroLayer, SampledRank
from lowrank_optax.matrices.selection import path_string
from lowrank_optax.modules.select import modules_by_path


def maestro_modules(model: nnx.Module) -> dict[str, MaestroLayer]:
    """The Maestro layers of a model, by path; shared ones once.

    Raises:
      ValueError: If there is none.
    """
    found = modules_by_path(model, lambda module: isinstance(module, MaestroLayer))
    if not found:
        raise ValueError(
            f"the {type(model).__name__} has no MaestroLinear or MaestroConv: make layers of "
            "these, or call maestro.convert(model)."
        )
    return {path_string(path): layer for path, layer in found.items()}


def current_ranks(model: nnx.Module) -> dict[str, jax.Array]:
    """Return the current rank of each Maestro layer by its path, int32 ``[]`` or ``[layers]``.

    Raises:
      ValueError: If the model has no Maestro layer.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> model = nnx.Sequential(lro.layers.MaestroLinear(8, 4, rngs=nnx.Rngs(0)))
      >>> print(lro.layers.maestro.current_ranks(model))
      {'layers/0': Array(4, dtype=int32)}
    """
    return {path: layer.rank[...] for path, layer in maestro_modules(model).items()}


def set_ranks(model: nnx.Module, ranks: Mapping[str, ArrayLike] | None) -> nnx.Module:
    """Give Maestro layers the rank that they use in the calls that follow, in place.

    Call it in the step, on the model that the step differentiates, with ranks from `sample_ranks`.
    Current ranks stay. Before a model with sampled ranks is evaluated, remove them with None.

    Args:
      model: A model with Maestro layers.
      ranks: Rank of layers by path; layers that are not in it use their current rank. None for all
        layers to do so.

    Returns:
      The model itself.

    Raises:
      ValueError: If the model has no Maestro layer, a path is not that of one, a rank is not an
        integer of the shape of the layer's current rank, or a Python integer is not from 0 to the
        number of its directions; others are clipped to this range.

    Example:
      >>> from flax import nnx
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> from lowrank_optax.layers import maestro
      >>> model = nnx.Sequential(lro.layers.MaestroLinear(8, 4, rngs=nnx.Rngs(0)))
      >>> ranks = maestro.sample_ranks(jax.random.key(0), maestro.current_ranks(model))
      >>> maestro.set_ranks(model, ranks)(jnp.ones((2, 8))).shape
      (2, 4)

    Reference:
      Horváth et al., 2024, https://arxiv.org/abs/2308.14929.
    """
    layers = maestro_modules(model)
    ranks = {} if ranks is None else ranks
    for path in ranks:
        if path not in layers:
            near = ", ".join(difflib.get_close_matches(path, layers, n=5, cutoff=0.0))
            raise ValueError(f"ranks has {path!r}, which is no Maestro layer; near it are: {near}.")
        layer = layers[path]
        check_prefix(ranks[path], layer.width(), layer.stack(), f"ranks[{path!r}]")
    for path, layer in layers.items():
        layer.sampled_rank = nnx.data(None)
        if path in ranks:
            layer.sampled_rank = SampledRank(jnp.asarray(ranks[path], jnp.int32))
    return model


def penalty(model: nnx.Module, *, hierarchical: bool = True) -> jax.Array:
    r"""Return the group lasso of all Maestro layers, to add to the loss with a weight.

    .. math::
      \sum_{layers} \sum_k \|A_{:, k:}\|_F + \|B_{k:}\|_F

    Direction ``k`` is in ``k`` nested groups, so the later ones are pressed hardest. All directions
    count, also beyond the current ranks.

    Adam rescales gradients, so that the weight loses its meaning there: use SGD, or `prox` instead.

    Args:
      model: A model with Maestro layers.
      hierarchical: Whether groups are nested; otherwise each direction is a group.

    Returns:
      A scalar in float32 at least.

    Raises:
      ValueError: If the model has no Maestro layer.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> layer = lro.layers.MaestroLinear(1, 1, rngs=nnx.Rngs(0))
      >>> layer.ordered_in.kernel[...], layer.ordered_out.kernel[...] = 3.0, 4.0
      >>> print(lro.layers.maestro.penalty(layer))
      7.0

    Reference:
      Horváth et al., 2024, https://arxiv.org/abs/2308.14929.
    """
    norms = [
        x
        for layer in maestro_modules(model).values()
        for x in group_norms(layer.factors(), hierarchical=hierarchical)
    ]
    return sum(map(jnp.sum, norms), jnp.zeros([]))


def importance(model: nnx.Module, *, hierarchical: bool = True) -> dict[str, jax.Array]:
    """Return the importance of each direction of each Maestro layer by its path, ``[..., R]``.

    It is the product of the norms of both factors from this direction on, which never increases;
    or of this direction alone.

    Args:
      model: A model with Maestro layers.
      hierarchical: Whether norms are those of tails.

    Returns:
      Arrays in float32 at least.

    Raises:
      ValueError: If the model has no Maestro layer.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> layer = lro.layers.MaestroLinear(1, 1, rngs=nnx.Rngs(0))
      >>> layer.ordered_in.kernel[...], layer.ordered_out.kernel[...] = 3.0, 4.0
      >>> print(lro.layers.maestro.importance(layer))
      {'': Array([12.], dtype=float32)}

    Reference:
      Horváth et al., 2024, https://arxiv.org/abs/2308.14929.
    """
    found = {}
    for path, layer in maestro_modules(model).items():
        of_first, of_second = group_norms(layer.factors(), hierarchical=hierarchical)
        found[path] = of_first * of_second
    return found


def important_ranks(model: nnx.Module, threshold: float = 1e-5) -> dict[str, jax.Array]:
    """Return the number of important directions of each Maestro layer by its path, for `set_ranks`.

    These are directions with an `importance` of at least the threshold, a prefix. The model does
    not change, and needs no current ranks: a step that draws from these has no other state than the
    weights.

    Args:
      model: A model with Maestro layers.
      threshold: Smallest importance of a direction that counts, a product of two norms.

    Returns:
      int32 arrays ``[]``, or ``[layers]`` for a stack.

    Raises:
      ValueError: If the model has no Maestro layer, or ``threshold`` is negative or not finite.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.layers.MaestroLinear(2, 2, rngs=nnx.Rngs(0))
      >>> layer.ordered_in.kernel[...] = jnp.array([[3.0, 0], [4, 1]])
      >>> layer.ordered_out.kernel[...] = jnp.array([[1.0, 2], [2, 0]])
      >>> print(lro.layers.maestro.important_ranks(layer, threshold=3.0))
      {'': Array(1, dtype=int32)}

    Reference:
      Horváth et al., 2024, https://arxiv.org/abs/2308.14929.
    """
    if not 0 <= threshold < float("inf"):
        raise ValueError(f"threshold={threshold!r} must be finite and not negative.")
    # A direction that is nan stays, as masked it would be hidden.
    count = lambda values: jnp.sum(~(values < threshold), axis=-1, dtype=jnp.int32)
    return {path: count(values) for path, values in importance(model).items()}


def shrink(model: nnx.Module, threshold: float = 1e-5) -> dict[str, jax.Array]:
    """Set current ranks to `important_ranks`, in place; sampled ranks are removed.

    The other directions are masked, not removed: where they grow again, the next call counts them.
    Call it after every epoch, and `compact` after training.

    Args:
      model: A model with Maestro layers.
      threshold: Smallest importance of a direction to keep, a product of two norms. With `penalty`
        in the loss, norms hover near the learning rate times its weight: choose a threshold above.

    Returns:
      The new ranks, as `current_ranks`.

    Raises:
      ValueError: If the model has no Maestro layer, or ``threshold`` is negative or not finite.

    Warns:
      UserWarning: If all ranks are 0, so that only biases are left.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.layers.MaestroLinear(2, 2, rngs=nnx.Rngs(0))
      >>> layer.ordered_in.kernel[...] = jnp.array([[3.0, 0], [4, 1]])
      >>> layer.ordered_out.kernel[...] = jnp.array([[1.0, 2], [2, 0]])
      >>> print(lro.layers.maestro.shrink(layer, threshold=3.0))
      {'': Array(1, dtype=int32)}

    Reference:
      Horváth et al., 2024, https://arxiv.org/abs/2308.14929.
    """
    ranks = important_ranks(model, threshold)
    for path, layer in maestro_modules(model).items():
        layer.set_rank(ranks[path])
    traced = any(isinstance(x, jax.core.Tracer) for x in ranks.values())
    if not traced and not any(map(jnp.any, ranks.values())):
        warnings.warn(
            f"threshold={threshold} leaves a rank of 0 in every layer: only biases are left.",
            stacklevel=2,
        )
    return ranks
