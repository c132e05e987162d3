"""The update inside the backward pass: no more than one block's gradients exist at any time.

A reverse loop over the blocks recomputes a block, takes its gradients, runs the optimizer on that
layer of the parameters and the state, and writes both in place.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices.paths import leaves_by_path
from lowrank_optax.slices.call import Call
from lowrank_optax.slices.each_layer import each_layer, layers_of_stack, shapes_of_layer
from lowrank_optax.slices.independence import check_leaves_apart, check_parts
from lowrank_optax.slices.known_transformations import has_part, looks_at
from lowrank_optax.slices.parts import leaves_of_stack, update_leaves
from lowrank_optax.slices.update import rebuilt
from lowrank_optax.training.backward_loops import block_norms, norm_of, update_list, update_stack
from lowrank_optax.training.layered_models import is_in_stack, layered_model
from lowrank_optax.training.layered_passes import Gradients, Passes, Through


class UpdateInBackward(NamedTuple):
    """What `update_in_backward` returns: pure functions, to be jitted.

    Attributes:
      init: ``init(params) -> state``, that of the optimizer.
      step: ``step(params, state, batch, key=None, frozen=None) -> (params, state, loss, metrics)``.
        Donate ``params`` and ``state``. ``frozen`` are the weights that are not trained: arguments
        of the compiled step, which it reads one block at a time.
      loss: ``loss(params, batch, key=None, frozen=None) -> (loss, metrics)`` of the same model with
        the same random numbers, for evaluation.
    """

    init: Callable[[Any], Any]
    step: Callable[..., tuple[Any, Any, jax.Array, dict[str, Any]]]
    loss: Callable[..., tuple[jax.Array, dict[str, Any]]]


def update_in_backward(
    model: Any,
    tx: optax.GradientTransformation,
    *,
    loss: Callable[..., Any] | None = None,
    clip: Literal["block", "global"] | None = None,
    max_norm: float | None = None,
    micro_batches: int = 1,
    each: Literal["slice"] | None = None,
    wrt: Any = None,
) -> UpdateInBackward:
    """A training step that updates each block as soon as its gradients exist, in place.

    The forward pass stores the input of each block. The backward pass is a reverse loop over the
    blocks: it recomputes one, takes its gradients, runs ``tx`` on that layer of the parameters and
    of the state, and writes both. The gradients of a block leave it through the old weights, so the
    step computes what an ordinary step with full rematerialization does, to rounding, without its
    tree of gradients. The state is that of ``tx`` for all parameters: checkpoints of one step
    resume in the other, unless ``each`` is set.

    ``tx`` may be any transformation that works leaf by leaf and layer by layer: element-wise ones,
    every projected and low-bit optimizer of this library, chains, masks, partitions, schedules,
    injected hyperparameters. Gradients that are not finite pass through, as in optax.

    Args:
      model: A `LayeredFunctions`, with parameters as it says; or an ``nnx.Module`` with stacked or
        listed ``blocks``, such as `lowrank_optax.models.Decoder`, that has
        ``before_blocks(inputs)``, ``through_block(block, x)`` and ``after_blocks(x)``. With
        ``graphdef, params, frozen = nnx.split(model, wrt, ...)``, the parameters are then
        ``nnx.as_pure(params)`` and what is not trained ``nnx.as_pure(frozen)``; a batch is a pair
        ``(inputs, targets)``.
      tx: The optimizer.
      loss: ``loss(model, hidden, targets)``, a scalar or ``(loss, metrics)``, for an
        ``nnx.Module``; None for a `LayeredFunctions`, whose ``head`` returns it.
      clip: ``"global"`` scales all gradients down if their norm exceeds ``max_norm``, as
        ``optax.clip_by_global_norm`` does; a first backward pass, which takes the time of two
        forward passes and more, computes the norm. ``"block"`` does so with each block, with what
        only the head uses, and with the other parameters, with ``max_norm`` divided by the square
        root of the number of these parts, so that the whole norm cannot exceed it.
      max_norm: Largest norm.
      micro_batches: Number of equal parts of the batch, along the first axis of its arrays. Their
        gradients are averaged in float32, one block at a time; the inputs of blocks are stored for
        all of them.
      each: ``"slice"`` lets ``tx`` see each layer of a stack as a leaf of its own, as in an
        unrolled model. What it computes from a leaf, such as the norms of ``optax.lamb`` or the
        root mean squares of ``optax.adafactor``, and what it does by a leaf's shape, is then of a
        layer. The state is that of one block, stacked, with step counts once: a checkpoint of the
        unrolled model's optimizer is taken, once its blocks are stacked. It equals
        ``tx.init(params)``, that of the ordinary step, where arrays of the state have the shapes of
        parameters, as in ``optax.lamb``; one number for a leaf, as in ``optax.novograd``, is here
        an array ``[layers]``.
      wrt: Filter of what is trained of an ``nnx.Module``, as of ``nnx.Optimizer``: for adapters
        ``lro.adapters.trainable``. None for ``nnx.Param``, and for a `LayeredFunctions`, of which
        what is in ``params`` is trained, and what is in ``frozen`` is not.

    Returns:
      The functions `UpdateInBackward`: ``init``, ``step`` and ``loss``. The key of a step may be
      None if the model draws nothing. Metrics are those of the loss, averaged over micro-batches,
      with ``gradient_norm`` and ``block_gradient_norms``, float32 ``[layers]``, before clipping.

    Raises:
      TypeError: If ``model``, ``loss`` or ``frozen`` is of another kind.
      ValueError: If an argument is out of range; if ``tx`` looks at all leaves, or at whole stacks
        without ``each``, or is ``optax.MultiSteps``; in ``step``, if the update of a layer is not
        independent of the others, if a parameter is not floating-point, if ``params`` and
        ``frozen`` do not fit together or an ``nnx.Module`` has weights that are in neither, if a
        module draws random numbers without a key or changes other variables, if a block changes
        the type of its input, if a metric has the name of one of the step's, or if a batch cannot
        be cut into micro-batches.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> model = lro.training.LayeredFunctions(
      ...     embed=lambda params, batch, key: params["embed"][batch["tokens"]],
      ...     block=lambda layer, x, batch, key: x + jnp.tanh(x @ layer["kernel"]),
      ...     head=lambda params, x, batch, key: jnp.mean((x @ params["head"] - batch["y"]) ** 2),
      ... )
      >>> params = {
      ...     "embed": jnp.ones((10, 8)),
      ...     "blocks": {"kernel": jnp.zeros((3, 8, 8))},
      ...     "head": jnp.ones(8),
      ... }
      >>> update = lro.update_in_backward(model, optax.adamw(1e-2))
      >>> step = jax.jit(update.step, donate_argnums=(0, 1))
      >>> batch = {"tokens": jnp.zeros((2, 4), jnp.int32), "y": jnp.zeros((2, 4))}
      >>> params, state, loss, metrics = step(params, update.init(params), batch, None)
      >>> print(loss, metrics["block_gradient_norms"].shape)
      64.0 (3,)

    Reference:
      Lv et al., Full Parameter Fine-tuning for Large Language Models with Limited Resources
      (LOMO), 2023, https://arxiv.org/abs/2306.09782, Algorithm 1, for any optimizer.
    """
    layered = layered_model(model, loss, wrt)
    _check(tx, clip, max_norm, micro_batches, each)
    tx = optax.with_extra_args_support(tx)

    def passed(params: Any, batch: Any, key: Any, frozen: Any) -> Passes:
        return Passes(layered, params, layered.frozen(frozen), batch, key, micro_batches)

    def init(params: Any) -> Any:
        return each_layer(tx, is_in_stack(params)).init(params)

    def step(params: Any, state: Any, batch: Any, key: Any = None, frozen: Any = None) -> Any:
        return _step(passed(params, batch, key, frozen), tx, state, clip, max_norm, each)

    def evaluate(params: Any, batch: Any, key: Any = None, frozen: Any = None) -> Any:
        return passed(params, batch, key, frozen).loss()

    return UpdateInBackward(tx.init if each is None else init, step, evaluate)


def _check(tx: Any, clip: Any, max_norm: Any, micro_batches: Any, each: Any) -> None:
    """Raises ValueError for what `update_in_backward` cannot run."""
    if clip not in (None, "block", "global"):
        raise ValueError(f"clip={clip!r} must be 'block', 'global' or None.")
    if (clip is None) != (max_norm is None):
        raise ValueError(f"clip={clip!r} and max_norm={max_norm!r} are given together or not.")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm={max_norm!r} must be positive.")
    if not isinstance(micro_batches, int) or micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches!r} must be an int of at least 1.")
    if each not in (None, "slice"):
        raise ValueError(f"each={each!r} must be 'slice' or None.")
    if has_part(tx, "MultiSteps"):
        raise ValueError(
            "MultiSteps stores all gradients, which never exist at one time here: set "
            "micro_batches= instead."
        )
    if found := looks_at(tx, whole_leaves=each is None):
        instead = {
            "clip_by_global_norm": "set clip='global' and max_norm= instead.",
            "hutchinson_estimator_diag_hessian": "it is a part of optax.contrib.sophia.",
            "apply_if_finite": "blocks are written before all gradients are known.",
        }
        otherwise = {
            "all leaves": "use it with an ordinary step.",
            "a whole leaf": "set each='slice' to compute it from each layer, as in an unrolled "
            "model.",
        }
        raise ValueError(
            f"{found[0]} computes a number from {found[1]}, which never exists here: "
            + instead.get(found[0], otherwise[found[1]])
        )


def _step(
    run: Passes, tx: Any, state: Any, clip: str | None, max_norm: Any, each: str | None
) -> tuple[Any, Any, jax.Array, dict[str, Any]]:
    params, find_leaves = run.params, leaves_of_stack
    if each is not None:
        is_stack, find_leaves = is_in_stack(params), layers_of_stack
        layer = shapes_of_layer(params, is_stack)
        check_leaves_apart(Call.of(tx, layer, (), layer, None, {}), tx)
        tx = each_layer(tx, is_stack)
        shapes = lambda tree: {path: jnp.shape(x) for path, x in leaves_by_path(tree).items()}
        if shapes(state) != shapes(jax.eval_shape(tx.init, params)):
            raise ValueError(
                "the state has other shapes than update.init(params), which with each='slice' is "
                "not tx.init(params) for this optimizer."
            )
    jax.eval_shape(tx.update, params, state, params)  # raises what the ordinary step would
    call = Call.of(tx, params, state, params, None, {})
    if each is None:
        check_parts(call, [tx])
    x, inputs = run.forward()
    of_head, dx, (loss, metrics) = run.head_gradients(x)
    waits = run.used_by_embed.keys() | run.used_by_blocks.keys()
    early = {i: g for i, g in of_head.items() if i not in waits}
    of_both = {i: g for i, g in of_head.items() if i in waits}

    def late(through: Through) -> Gradients:
        """What has no gradient before the last block is done, or none at all."""
        dx, of_blocks = through
        total: Gradients = {}
        for part in (run.embed_gradients(dx), of_blocks, of_both):
            total |= {i: total[i] + g if i in total else g for i, g in part.items()}
        params = {i: call.params[i] for i in run.outside if i not in early}
        return {
            i: total[i].astype(x.dtype) if i in total else jnp.zeros_like(x)
            for i, x in params.items()
        }

    through = run.backward_from(dx)
    if clip == "global":
        last, norms = block_norms(run, through, inputs)
        norm = norm_of((early, late(last), norms))
        clipped = lambda gradients: _clipped(gradients, norm, max_norm)
    elif clip == "block":
        blocks = sum(map(bool, run.listed)) if run.listed else bool(run.stack) * run.layers
        parts = blocks + bool(early) + (len(run.outside) > len(early))
        clipped = lambda gradients: _clipped(gradients, norm_of(gradients), max_norm / parts**0.5)
    else:
        clipped = lambda gradients: gradients

    new, arrays = update_leaves(call, clipped(early))
    if run.is_written_out:
        update = lambda gradients: update_leaves(call, clipped(gradients))
        last, norms, of_blocks = update_list(run, through, inputs, update)
        vectors = {}
    else:
        leaves = find_leaves(call, [i for i in run.stack if run.leaves[i].ndim > 2])
        last, norms, of_blocks, vectors = update_stack(call, run, leaves, through, inputs, clipped)
    of_rest = late(last)
    of_outside = update_leaves(call, {**clipped(of_rest), **vectors})
    for leaves, part in (of_blocks, of_outside):
        new |= leaves
        arrays |= part
    metrics = {
        **metrics,
        "block_gradient_norms": norms,
        "gradient_norm": norm_of((early, of_rest, norms)),
    }
    new = call.treedef.unflatten([new[i] for i in range(len(call.params))])
    return new, rebuilt(state, arrays), loss, metrics


def _clipped(tree: Any, norm: jax.Array, bound: Any) -> Any:
    """The tree, scaled down to the bound where the norm exceeds it, as optax computes it."""
    scaled = lambda x: jnp.where(norm < bound, x, (x / norm.astype(x.dtype)) * bound)
    return jax.tree.map(lambda x: scaled(x).astype(x.dtype), tree)
