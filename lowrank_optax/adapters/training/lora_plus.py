"""LoRA+: the second factor learns faster than the first."""

from typing import Any

import jax
import optax

from lowrank_optax.matrices.paths import compiled_pattern, normalised_path
from lowrank_optax.quantization import Bits
from lowrank_optax.states.assemble import has_no_decay, optimizer
from lowrank_optax.states.precision import in_float32

# Arrays of adapters, and names of what is one-dimensional in a single layer.
_FACTORS = ("A", "B", "magnitude")
_FAST = ("B", "magnitude", "bias", "scale")
_NO_DECAY = ("bias", "scale")


def scale_lora_plus(
    ratio: Any = 16.0, embedding_ratio: Any = 1.0, *, embeddings: str = "embed"
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA+ as the last part of a chain: ``B`` moves ``ratio`` times as far as ``A``.

    .. math::
      \Delta B \leftarrow \lambda \, \Delta B, \qquad \Delta A \leftarrow \Delta A.

    It multiplies whole updates, weight decay with them, as a learning rate of their own would. As
    in the official code, leaves of one axis (biases, scales of norms, `DoRA`'s magnitudes) move
    like ``B``, and adapters of embeddings have a rate of their own. Leaves are known by the last
    name of their path: ``B``, ``magnitude``, ``bias``, ``scale``.

    Args:
      ratio: The paper's :math:`\lambda`: 16 is its rule of thumb, with a learning rate about half
        of LoRA's; 1 leaves LoRA as it is.
      embedding_ratio: Factor of the updates of adapters of embeddings.
      embeddings: Regular expression found in the paths of embeddings, in any case.

    Returns:
      A transformation without state. Updates keep their dtypes.

    Raises:
      ValueError: If a ratio is not positive, or ``embeddings`` is not a regular expression.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params = {"A": jnp.ones((2, 1)), "B": jnp.zeros((1, 2))}
      >>> tx = optax.chain(optax.sgd(0.5), lro.adapters.scale_lora_plus(16.0))
      >>> updates, _ = tx.update({"A": jnp.ones((2, 1)), "B": jnp.ones((1, 2))}, tx.init(params))
      >>> print(updates["A"].ravel(), updates["B"].ravel())
      [-0.5 -0.5] [-8. -8.]

    Reference:
      Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, 2024,
      https://arxiv.org/abs/2402.12354; groups as in the authors' ``lora_plus.py``.
    """
    _check_positive(ratio=ratio, embedding_ratio=embedding_ratio)
    group_of = _grouping(embeddings)
    factors = {"B": ratio, "embedding": embedding_ratio}

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args

        def multiplied(path: Any, update: jax.Array) -> jax.Array:
            factor = factors.get(group_of(path, update))
            return update if factor is None else (update * factor).astype(update.dtype)

        return jax.tree_util.tree_map_with_path(multiplied, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def lora_plus_adamw(
    learning_rate: optax.ScalarOrSchedule,
    ratio: float = 16.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    embedding_learning_rate: optax.ScalarOrSchedule = 1e-6,
    embeddings: str = "embed",
    state_bits: Bits | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with LoRA+'s learning rates, in the groups of the official code.

    .. math::
      A \leftarrow A - \eta \, (\mathrm{Adam}(\nabla_A) + w A), \qquad
      B \leftarrow B - \lambda \eta \, (\mathrm{Adam}(\nabla_B) + w B).

    Biases and scales of norms move at :math:`\lambda \eta` and do not decay; adapters of embeddings
    have ``embedding_learning_rate``. Around another optimizer: `scale_lora_plus`.

    Args:
      learning_rate: A float or an optax schedule, :math:`\eta`.
      ratio: The paper's :math:`\lambda`.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled decay :math:`w`.
      embedding_learning_rate: Learning rate of adapters of embeddings; the official default.
      embeddings: As for `scale_lora_plus`.
      state_bits: Bits of the moments between steps, 8 or 4: see `low_bit`; None for float32.

    Returns:
      An optimizer that needs ``params`` if there is weight decay. Moments are float32.

    Raises:
      ValueError: If ``ratio`` is not positive, or ``embeddings`` is not a regular expression.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"A": jnp.ones((2, 1)), "B": jnp.zeros((1, 2))}
      >>> tx = lro.adapters.lora_plus_adamw(1e-3)
      >>> updates, _ = tx.update({"A": jnp.ones((2, 1)), "B": jnp.ones((1, 2))}, tx.init(params))
      >>> print(updates["A"].ravel().round(4), updates["B"].ravel().round(4))
      [-0.001 -0.001] [-0.016 -0.016]

    Reference:
      Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, 2024,
      https://arxiv.org/abs/2402.12354.
    """
    _check_positive(ratio=ratio)
    group_of = _grouping(embeddings)
    faster = lambda rate: (lambda count: rate(count) * ratio) if callable(rate) else rate * ratio
    decays = lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: _name(path) not in _NO_DECAY, tree
    )
    # One optimizer for each rate: a schedule that starts at zero has no ratio to another.
    mask = None if has_no_decay(weight_decay) else decays
    adam = in_float32(optax.scale_by_adam(b1, b2, eps))
    adamw = lambda rate: optimizer(adam, rate, weight_decay, mask, state_bits=state_bits)
    parts: dict[Any, Any] = {
        "A": adamw(learning_rate),
        "B": adamw(faster(learning_rate)),
        "embedding": adamw(embedding_learning_rate),
    }
    groups = lambda tree: jax.tree_util.tree_map_with_path(group_of, tree)
    return optax.with_extra_args_support(optax.partition(parts, groups))


def _grouping(embeddings: str) -> Any:
    """``group_of(path, leaf)``: ``"A"``, ``"B"`` or ``"embedding"``."""
    pattern = compiled_pattern("embeddings", f"(?i:{embeddings})")

    def group_of(path: Any, leaf: Any) -> str:
        name = _name(path)
        owner = "/".join(normalised_path(path)[:-1])
        if name in _FACTORS and pattern.search(owner):
            return "embedding"
        return "B" if name in _FAST or leaf.ndim <= 1 else "A"

    return group_of


def _name(path: Any) -> str:
    names = normalised_path(path)
    return names[-1].rsplit("/", 1)[-1] if names else ""


def _check_positive(**ratios: Any) -> None:
    for name, ratio in ratios.items():
        if isinstance(ratio, int | float) and not ratio > 0:
            raise ValueError(f"{name}={ratio!r} must be positive.")
