"""The table of faults: in each file one line that a mistake could have left there.

Every fault changes what a user gets: a number, a dtype, a placement, or a refusal. None keeps the
library from being imported, and none makes it run without end. To add one, add a row; `run.py`
runs them, and `test_faults.py` checks that the table fits the library as it is.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """One wrong line.

    Attributes:
        name: what is wrong, as a short phrase.
        path: file of the library, relative to the repository's root.
        old: text that occurs exactly once in the file.
        new: text that replaces it.
        tests: arguments of pytest that select the tests which should fail, paths first.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


PROJECTION = (
    Fault(
        "moments rotated by the transposed matrix",
        "lowrank_optax/projection/subspaces/base.py",
        'product("...ds,...dr->...sr", new, old, view.small_partition)',
        'product("...ds,...dr->...sr", old, new, view.small_partition)',
        ("tests/projection/test_inner_moments.py",),
    ),
    Fault(
        "basis refreshed one step late",
        "lowrank_optax/projection/refresh.py",
        "return planned + ((count - planned) // interval + 1) * interval",
        "return planned + ((count - planned) // interval + 1) * interval + 1",
        ("tests/projection/test_refresh.py",),
    ),
    Fault(
        "one array twice in a state, which can't be donated then",
        "lowrank_optax/projection/refresh.py",
        "zeros = lambda: zeros_per_matrix(view, view.dtype)  # no buffer twice, for donation",
        "zeros = lambda shared=zeros_per_matrix(view, view.dtype): shared",
        ("tests/projection/test_refresh.py",),
    ),
    Fault(
        "norm of a gradient that is not finite remembered",
        "lowrank_optax/projection/limiter.py",
        "return factor, jnp.where(jnp.isfinite(norm), norm * factor, previous)",
        "return factor, norm * factor",
        ("tests/projection/test_limiter.py",),
    ),
    Fault(
        "gradient projected in the basis of the last step",
        "lowrank_optax/projection/leaf.py",
        "projected = parts.subspace.project(state.basis, leaf.matrix, leaf.view)",
        "projected = parts.subspace.project(leaf.state.basis, leaf.matrix, leaf.view)",
        ("tests/projection/test_transform.py",),
    ),
    Fault(
        "momentum before a refresh lifted in the basis after it",
        "lowrank_optax/projection/residuals/base.py",
        "step.subspace.lift(step.last_basis, step.moments.before, step.view)",
        "step.subspace.lift(step.basis, step.moments.before, step.view)",
        ("tests/projection/test_error_feedback.py",),
    ),
    Fault(
        "bias correction of the limited norm one step off",
        "lowrank_optax/projection/residuals/scaling.py",
        "steps = (count + 1).astype(norm.dtype)",
        "steps = (count + 2).astype(norm.dtype)",
        ("tests/projection/test_residuals.py",),
    ),
    Fault(
        "residual of Fira dropped",
        "lowrank_optax/projection/residuals/scaling.py",
        "return lifted + matrix * outside, previous",
        "return lifted, previous",
        ("tests/projection/test_residuals.py",),
    ),
    Fault(
        "scale of APOLLO without its root",
        "lowrank_optax/projection/recipes/apollo.py",
        "scale=scale**0.5,",
        "scale=scale,",
        ("tests/projection/recipes/test_apollo.py",),
    ),
    Fault(
        "first moment corrected by beta2 at a refresh",
        "lowrank_optax/projection/inner_moments.py",
        "mean = leaves[first] / unbias",
        "mean = leaves[first] / correction",
        ("tests/projection/test_inner_moments.py",),
    ),
    Fault(
        "micro-batches summed and not averaged",
        "lowrank_optax/projection/transform.py",
        "mean = [x / micro_steps for x in sums]",
        "mean = list(sums)",
        ("tests/projection/test_accumulation.py",),
    ),
    Fault(
        "key of the first refresh reused at every one",
        "lowrank_optax/projection/transform.py",
        "key=jax.random.fold_in(jax.random.key(seed), state.count),",
        "key=jax.random.key(seed),",
        ("tests/projection/test_random_subspaces.py",),
    ),
    Fault(
        "directions beyond the active rank kept",
        "lowrank_optax/projection/subspaces/wrappers.py",
        "AdaptiveBasis(jnp.where(active[..., None, :], basis, 0), rank)",
        "AdaptiveBasis(basis, rank)",
        ("tests/projection/test_adaptive_rank.py",),
    ),
    Fault(
        "zero gradient enters the basis",
        "lowrank_optax/projection/leaf.py",
        "all_finite(matrix, matrix.ndim - 2) & jnp.any(matrix != 0, axis=(-2, -1))",
        "all_finite(matrix, matrix.ndim - 2)",
        ("tests/projection/test_transform.py",),
    ),
)

OPTIMIZERS = (
    Fault(
        "eps of AdaGrad-Norm outside the root",
        "lowrank_optax/optimizers/adagrad_norm.py",
        "jax.lax.rsqrt(s + eps)",
        "1 / (jnp.sqrt(s) + eps)",
        ("tests/optimizers/test_adagrad_norm.py",),
    ),
    Fault(
        "inner learning rate read one step late",
        "lowrank_optax/optimizers/extrapolate.py",
        "inner_learning_rate(count) if callable(inner_learning_rate)",
        "inner_learning_rate(state.count) if callable(inner_learning_rate)",
        ("tests/optimizers/test_extrapolate.py",),
    ),
    Fault(
        "look-ahead along a gradient that is not finite",
        "lowrank_optax/optimizers/extrapolation.py",
        "previous = zero_unless_finite(gradient)",
        "previous = gradient",
        ("tests/optimizers/test_extrapolation.py",),
    ),
    Fault(
        "update against the rule's direction",
        "lowrank_optax/optimizers/gradient_direction.py",
        "jnp.sign(g if along_gradient else -g)",
        "jnp.sign(-g if along_gradient else g)",
        ("tests/optimizers/test_gradient_direction.py",),
    ),
    Fault(
        "second moment of Grams corrected by beta1",
        "lowrank_optax/states/assemble.py",
        "root = jnp.sqrt(1 - b2**steps)",
        "root = jnp.sqrt(1 - b1**steps)",
        ("tests/optimizers/test_grams.py",),
    ),
    Fault(
        "gamma of NAG-GS moves away from mu",
        "lowrank_optax/optimizers/nag_gs.py",
        "damping + alpha / (1 + alpha) * (convexity - damping)",
        "damping - alpha / (1 + alpha) * (convexity - damping)",
        ("tests/optimizers/test_nag_gs.py",),
    ),
    Fault(
        "uniform average of couplings without the first",
        "lowrank_optax/optimizers/mirror_sinkhorn/iterates.py",
        "average + (new - average) / (count + 1), earlier",
        "average + (new - average) / count, earlier",
        ("tests/optimizers/test_mirror_sinkhorn.py",),
    ),
    Fault(
        "stop_gradient of the transport solver missing",
        "lowrank_optax/optimizers/mirror_sinkhorn/transport.py",
        "frozen = jax.lax.stop_gradient((costs, rows, columns))",
        "frozen = (costs, rows, columns)",
        ("tests/optimizers/test_mirror_sinkhorn_transport.py",),
    ),
)

TRAINING = (
    Fault(
        "damping of one_cycle by the momentum",
        "lowrank_optax/training/cycling.py",
        "scale = 1 - values[str(momentum)]",
        "scale = values[str(momentum)]",
        ("tests/training/test_one_cycle.py",),
    ),
    Fault(
        "last step of the cycle never reached",
        "lowrank_optax/training/cycling.py",
        "last = total_steps - 1",
        "last = total_steps",
        ("tests/training/test_one_cycle.py",),
    ),
    Fault(
        "variance of gradients over n and not n - 1",
        "lowrank_optax/training/gradient_noise.py",
        "jnp.maximum(squares, 0.0) / (total - 1)",
        "jnp.maximum(squares, 0.0) / total",
        ("tests/training/test_gradient_noise.py",),
    ),
    Fault(
        "norm test by eta and not its square",
        "lowrank_optax/training/batch_size.py",
        "return ratio(variance, self.eta**2 * norm)",
        "return ratio(variance, self.eta * norm)",
        ("tests/training/test_batch_size.py",),
    ),
    Fault(
        "weight decay without the learning rate",
        "lowrank_optax/training/weight_decay.py",
        "return rate * strength",
        "return strength",
        ("tests/training/test_weight_decay_coupling.py",),
    ),
    Fault(
        "bias correction of the smoothed loss one step off",
        "lowrank_optax/training/range_test.py",
        "(jnp.maximum(index, 0) + 1)",
        "(jnp.maximum(index, 0) + 2)",
        ("tests/training/test_range_test.py",),
    ),
    Fault(
        "another dropout in the recomputed block",
        "lowrank_optax/training/layered_passes.py",
        "keys = self.keys(BLOCKS, layer)",
        "keys = self.keys(HEAD, layer)",
        ("tests/training/test_update_in_backward.py",),
    ),
    Fault(
        "gradients of micro-batches summed and not averaged",
        "lowrank_optax/training/layered_passes.py",
        "lambda t, x: (t / self.count).astype(x.dtype)",
        "lambda t, x: t.astype(x.dtype)",
        ("tests/training/test_update_in_backward.py",),
    ),
    Fault(
        "leaves that depend on one another updated at different times",
        "lowrank_optax/training/update_in_backward.py",
        "check_parts(call, [tx])",
        "check_parts(call, [])",
        ("tests/training/test_update_in_backward.py",),
    ),
    Fault(
        "a number of each layer computed from the whole stack",
        "lowrank_optax/slices/each_layer.py",
        "jax.vmap(tx.init, (axes,), new_axes)(params)",
        "tx.init(params)",
        ("tests/slices/test_each_layer.py",),
    ),
    Fault(
        "layers as leaves whose optimizer selects by the shapes of stacks",
        "lowrank_optax/slices/each_layer.py",
        "call.whole._replace(tree=tree)",
        "call.whole",
        ("tests/training/test_update_in_backward.py",),
    ),
    Fault(
        "all layers rounded by the same random numbers",
        "lowrank_optax/slices/call.py",
        "key = jax.random.fold_in(key, whole.layer)",
        "key = jax.random.fold_in(key, 0)",
        ("tests/slices/test_each_layer.py",),
    ),
    Fault(
        "a flag of a NaN in a stack that is true if all layers had one",
        "lowrank_optax/training/backward_loops.py",
        "map(jnp.any, of_layers)",
        "map(jnp.all, of_layers)",
        ("tests/training/test_update_in_backward.py",),
    ),
    Fault(
        "the head's gradient of a tied embedding left out",
        "lowrank_optax/training/update_in_backward.py",
        "for part in (run.embed_gradients(dx), of_blocks, of_both):",
        "for part in (run.embed_gradients(dx), of_blocks):",
        ("tests/training/test_update_in_backward.py",),
    ),
    Fault(
        "of what all blocks share, the gradient of one block",
        "lowrank_optax/training/layered_passes.py",
        "jax.tree.map(jnp.add, total, shared)",
        "jax.tree.map(lambda t, g: g.astype(t.dtype), total, shared)",
        ("tests/training/test_update_in_backward_frozen.py",),
    ),
    Fault(
        "frozen blocks before the first trained one visited backwards",
        "lowrank_optax/training/backward_loops.py",
        "reversed(range(run.first_layer, run.layers))",
        "reversed(range(run.layers))",
        ("tests/training/test_update_in_backward_frozen.py",),
    ),
)

ADAPTERS = (
    Fault(
        "LoRA scaled by alpha and not alpha / r",
        "lowrank_optax/adapters/methods/lora.py",
        "return alpha / (rank**0.5 if self.rank_stabilized else rank)",
        "return alpha",
        ("tests/adapters/test_lora.py",),
    ),
    Fault(
        "change subtracted when merged",
        "lowrank_optax/adapters/base.py",
        "weight.astype(jnp.float32) + self.delta(p, weight)",
        "weight.astype(jnp.float32) - self.delta(p, weight)",
        ("tests/adapters/test_nnx_switching.py",),
    ),
    Fault(
        "start of PiSSA donated with what is trained",
        "lowrank_optax/adapters/methods/pissa.py",
        '"A_0": jnp.copy(a)',
        '"A_0": a',
        ("tests/adapters/test_pissa.py",),
    ),
    Fault(
        "first factor of LoRA-FA trained",
        "lowrank_optax/adapters/methods/lora_fa.py",
        'lora.frozen | {"A": trainable.pop("A")}',
        "lora.frozen",
        ("tests/adapters/test_lora_fa.py",),
    ),
    Fault(
        "identity left out of the blocks of MiSSBat",
        "lowrank_optax/adapters/methods/miss.py",
        "_product(c, blocks) + self._spread(c, blocks)",
        "_product(c, blocks)",
        ("tests/adapters/test_miss.py",),
    ),
    Fault(
        "change of RandLoRA on a square weight transposed",
        "lowrank_optax/adapters/methods/randlora.py",
        "if shape[0] <= shape[1] else (v, u)",
        "if shape[0] < shape[1] else (v, u)",
        ("tests/adapters/test_randlora.py",),
    ),
    Fault(
        "a layer's own product taken for that of its parameter",
        "lowrank_optax/modules/spec.py",
        "return masked or norm or _has_own_product(module)",
        "return masked or norm",
        ("tests/layers/test_powerprop_adapters.py",),
    ),
    Fault(
        "product given to a layer whose class says it is plain taken for plain",
        "lowrank_optax/modules/spec.py",
        "return given or not module.plain_weights",
        "return not module.plain_weights",
        ("tests/layers/test_powerprop_adapters.py",),
    ),
    Fault(
        "modules trained inside a module of adapted parameters accepted",
        "lowrank_optax/adapters/peft/parameter_names.py",
        'if name.startswith(f"{module}.")',
        "if name == module",
        ("tests/adapters/test_peft_parameters.py",),
    ),
    Fault(
        "cause of a refusal to cut leaves lost",
        "lowrank_optax/slices/update.py",
        "from next(iter(failures), None)",
        "from None",
        ("tests/slices/test_independence.py",),
    ),
    Fault(
        "arrays of a file on one device",
        "lowrank_optax/adapters/peft/module_names.py",
        'if getattr(before, "committed", False):',
        'if getattr(before, "comitted", False):',
        ("tests/adapters/test_nnx_sharded.py",),
    ),
    Fault(
        "scale missing in LoRA-FA's projection",
        "lowrank_optax/adapters/training/lora_fa_projection.py",
        "columns = a.astype(jnp.float32) * scale[..., None, :]",
        "columns = a.astype(jnp.float32)",
        ("tests/adapters/test_lora_fa_projection.py",),
    ),
    Fault(
        "AFLoRA's mask of frozen matrices inverted",
        "lowrank_optax/adapters/training/aflora_freezing.py",
        "jnp.where(over(flag, x), 0, x)",
        "jnp.where(over(flag, x), x, 0)",
        ("tests/adapters/test_aflora_frozen.py",),
    ),
    Fault(
        "SaRA unmerged by subtraction",
        "lowrank_optax/adapters/methods/sara.py",
        "changed = jnp.where(is_value, initial, subtracted)",
        "changed = subtracted",
        ("tests/adapters/test_sara.py",),
    ),
    Fault(
        "SaRA's reselection one update early",
        "lowrank_optax/adapters/training/sara_masks.py",
        "state.count == reselect_after",
        "state.count + 1 == reselect_after",
        ("tests/adapters/test_sara_masks.py",),
    ),
    Fault(
        "LaMDA's rows frozen one row early",
        "lowrank_optax/adapters/training/lamda_freezing.py",
        "share = np.minimum((np.arange(rows) + 1) / ranks[..., None], 1)",
        "share = np.minimum(np.arange(rows) / ranks[..., None], 1)",
        ("tests/adapters/test_lamda_freezing.py",),
    ),
    Fault(
        "FlyLoRA's bias of an overused rank raised",
        "lowrank_optax/adapters/training/flylora_balance.py",
        "step * _sign(-update)",
        "step * _sign(update)",
        ("tests/adapters/test_flylora_balance.py",),
    ),
    Fault(
        "FlyLoRA's equal scores routed to the higher rank",
        "lowrank_optax/adapters/methods/flylora.py",
        "index[None, :] < index[:, None]",
        "index[None, :] > index[:, None]",
        ("tests/adapters/test_flylora.py",),
    ),
    Fault(
        "PRILoRA's sums of squares not divided by the share of tokens",
        "lowrank_optax/adapters/training/prilora_pruning.py",
        "/ jnp.where(share == 0, 1, share)",
        "/ jnp.where(share > 0, 1, 1)",
        ("tests/adapters/test_prilora.py",),
    ),
    Fault(
        "what dropout keeps not scaled up",
        "lowrank_optax/adapters/operands.py",
        "jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))",
        "jnp.where(kept, x, jnp.zeros_like(x))",
        ("tests/adapters/test_operands.py",),
    ),
    Fault(
        "PEFT field that changes the function let through",
        "lowrank_optax/adapters/peft/parsing.py",
        "if refused := kind.refused(content):",
        "if len(refused := kind.refused(content)) > 1:",
        ("tests/adapters/test_peft_refusals.py",),
    ),
    Fault(
        "PEFT's first parameter of a module wrapped outermost",
        "lowrank_optax/adapters/peft/parameter_names.py",
        '".base_layer" * (len(of_module) - 1 - of_module.index(name))',
        '".base_layer" * of_module.index(name)',
        ("tests/adapters/test_peft_parameters.py",),
    ),
    Fault(
        "expert's index fast in PEFT's lora_A",
        "lowrank_optax/adapters/peft/tensors.py",
        "return tensor.reshape(*self.experts, -1, self.d_in).swapaxes(-1, -2)",
        "return tensor.reshape(-1, *self.experts, self.d_in).transpose(1, 2, 0)",
        ("tests/adapters/test_peft_parameters.py",),
    ),
    Fault(
        "values of the active adapter saved as those of another",
        "lowrank_optax/adapters/own_values.py",
        "settle(model, [name])",
        "settle(model, active_names(model))",
        ("tests/adapters/test_peft_files.py",),
    ),
    Fault(
        "square weights of GPT-2 merged transposed",
        "lowrank_optax/adapters/peft/base_files.py",
        "if inputs_first and adapted_outputs == inputs:",
        "if inputs_first and adapted_outputs == inputs and inputs != outputs:",
        ("tests/test_cli.py",),
    ),
    Fault(
        "strength of an adapter ignored",
        "lowrank_optax/adapters/layer_calls.py",
        "total + (change if strength == 1 else strength * change)",
        "total + change",
        ("tests/adapters/test_nnx_switching.py",),
    ),
    Fault(
        "bias of an einsum in the order of its weight",
        "lowrank_optax/adapters/layer_calls.py",
        "c for c in of_y if c in of_kernel",
        "c for c in of_kernel if c in of_y",
        ("tests/adapters/test_nnx_layers.py",),
    ),
    Fault(
        "core of LoTR transposed",
        "lowrank_optax/adapters/methods/lotr.py",
        "second = product(core, second)",
        "second = product(core.mT, second)",
        ("tests/adapters/test_lotr.py",),
    ),
    Fault(
        "cross term of DoRA's norms once and not twice",
        "lowrank_optax/adapters/methods/dora.py",
        "start + 2 * jnp.sum(second * cross, axis=-2)",
        "start + jnp.sum(second * cross, axis=-2)",
        ("tests/adapters/test_dora.py",),
    ),
)

ACTIVATIONS = (
    Fault(
        "policy that recomputes what it is to offload",
        "lowrank_optax/activations/policies.py",
        'for name, place in own.entries if place == "offload"]',
        'for name, place in own.entries if place == "host"]',
        ("tests/activations/test_policy.py",),
    ),
    Fault(
        "cotangent rounded to bfloat16 before the product",
        "lowrank_optax/activations/coded_backward.py",
        "gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))",
        "gradient.astype(jnp.bfloat16)",
        ("tests/activations/test_few_bit.py",),
    ),
    Fault(
        "NaN takes its whole block along",
        "lowrank_optax/quantization/blocks.py",
        "jnp.where(jnp.isfinite(blocks), blocks, 0)",
        "blocks",
        ("tests/activations/test_gated.py",),
    ),
    Fault(
        "gradient of the gate without the other factor",
        "lowrank_optax/activations/gating.py",
        "pull(gradient * up)[0]",
        "pull(gradient)[0]",
        ("tests/activations/test_gated.py",),
    ),
    Fault(
        "number on a boundary coded as above it",
        "lowrank_optax/quantization/maps.py",
        "code += jnp.where(x > boundary, above - below, 0)",
        "code += jnp.where(x >= boundary, above - below, 0)",
        ("tests/activations/test_coding.py",),
    ),
    Fault(
        "halves of packed bytes swapped",
        "lowrank_optax/quantization/packing.py",
        "jnp.concatenate([part & 15, part >> 4], axis)",
        "jnp.concatenate([part >> 4, part & 15], axis)",
        ("tests/quantization/test_packing.py",),
    ),
    Fault(
        "calls in a scan counted once",
        "lowrank_optax/activations/rewriting.py",
        "count=site.count * times,",
        "count=site.count,",
        ("tests/activations/test_calls.py",),
    ),
    Fault(
        "gelu exact by default",
        "lowrank_optax/activations/functions.py",
        "def gelu(x: ArrayLike, bits: int = 3, approximate: bool = True)",
        "def gelu(x: ArrayLike, bits: int = 3, approximate: bool = False)",
        ("tests/activations/test_functions.py",),
    ),
)

LAYERS = (
    Fault(
        "hidden units of a block shuffle in another order",
        "lowrank_optax/layers/structured/structures.py",
        "outputs = second(hidden.reshape(len(rows), hidden.shape[-1], self.blocks))",
        "outputs = second(hidden.mT)",
        ("tests/layers/test_structured.py",),
    ),
    Fault(
        "hidden units of a projected block shuffle numbered from another one",
        "lowrank_optax/layers/structured/factors.py",
        "first_in_part = -(-(in_v * width - in_u) // blocks)",
        "first_in_part = in_v * width // blocks",
        ("tests/layers/test_structured.py",),
    ),
    Fault(
        "output scaled where the guide is skipped",
        "lowrank_optax/layers/structured/feed_forward_layers.py",
        "return branch(is_guided, mixed, lambda: self._structured(rows))",
        "return branch(is_guided, mixed, lambda: (1 - weight) * self._structured(rows))",
        ("tests/layers/test_structured_nnx.py",),
    ),
    Fault(
        "factors hidden from the check that a merged weight is not differentiated",
        "lowrank_optax/layers/structured/feed_forward_layers.py",
        "y = _for_inference(y, self.factors())",
        "y = _for_inference(y, jax.lax.stop_gradient(self.factors()))",
        ("tests/layers/test_structured_nnx.py",),
    ),
    Fault(
        "slope of a power without the exponent",
        "lowrank_optax/layers/powerpropagation/reparameterisation.py",
        "alpha * _nonzero(theta32) ** (alpha - 1))",
        "_nonzero(theta32) ** (alpha - 1))",
        ("tests/layers/test_powerprop.py",),
    ),
    Fault(
        "gradient from chosen rows not scaled up to all",
        "lowrank_optax/layers/randomized/sketch.py",
        "return count / size if kind in ROW_KINDS else 1.0",
        "return 1.0",
        ("tests/layers/test_randomized_linear.py",),
    ),
    Fault(
        "layers of a stack pruned as one",
        "lowrank_optax/layers/powerpropagation/pruning.py",
        "layers = 1 if spec is None else math.prod(shape[:-2])",
        "layers = 1",
        ("tests/layers/test_powerprop_pruning.py",),
    ),
    Fault(
        "weights that a task owns drawn again",
        "lowrank_optax/layers/powerpropagation/packnet.py",
        "jnp.where(owner == 0, new, x)",
        "jnp.where(owner != 0, new, x)",
        ("tests/layers/test_powerprop_packnet.py",),
    ),
    Fault(
        "sign in the variance of a Gaussian sketch",
        "lowrank_optax/layers/randomized/variances.py",
        "variance = (norms.x * norms.y + norms.product) / size",
        "variance = (norms.x * norms.y - norms.product) / size",
        ("tests/layers/test_randomized_linear_variances.py",),
    ),
    Fault(
        "sum of the weights not scaled to a new maximum",
        "lowrank_optax/layers/attention/chunked.py",
        "total * shrink + weights.sum(-1)",
        "total + weights.sum(-1)",
        ("tests/layers/test_chunked_attention.py",),
    ),
    Fault(
        "gradients of scores without the mean gradient of the weights",
        "lowrank_optax/layers/attention/chunked.py",
        "weights * (d_weights - mean[..., None])",
        "weights * d_weights",
        ("tests/layers/test_chunked_attention.py",),
    ),
    Fault(
        "a window beyond the length overflows an int32",
        "lowrank_optax/layers/attention/attention_arguments.py",
        "min(int(after), key.shape[1])",
        "int(after)",
        ("tests/layers/test_chunked_attention.py",),
    ),
    Fault(
        "last chunk of keys in the window skipped",
        "lowrank_optax/layers/attention/chunked.py",
        "last_key // self.key_chunk + 1)",
        "-(-last_key // self.key_chunk))",
        ("tests/layers/test_chunked_attention.py",),
    ),
    Fault(
        "tie of a fixed-point number just below zero",
        "lowrank_optax/layers/fixed_point/quantizer.py",
        '"RND_MIN_INF": t < 0,',
        '"RND_MIN_INF": t > 0,',
        ("tests/layers/test_fixed_point.py",),
    ),
    Fault(
        "gradient of a saturated number's binary point left out",
        "lowrank_optax/layers/fixed_point/quantizer.py",
        "jnp.where(inside, target * step - wide, integer * step)",
        "jnp.where(inside, target * step - wide, 0)",
        ("tests/layers/test_fixed_point.py",),
    ),
    Fault(
        "fixed-point sum of half-precision terms in their own dtype",
        "lowrank_optax/layers/fixed_point/quantized_layers.py",
        "total = x.astype(jnp.float32) + y.astype(jnp.float32)",
        "total = x + y",
        ("tests/layers/test_fixed_point_layers.py",),
    ),
    Fault(
        "integers of a tie rounded as if the integer below were even",
        "lowrank_optax/layers/fixed_point/integers.py",
        "down % 2 == 1,",
        "down % 2 == 0,",
        ("tests/layers/test_fixed_point_integers.py",),
    ),
)

MODELS = (
    Fault(
        "sign in the rotary embedding",
        "lowrank_optax/models/rotary.py",
        "first * cos - second * sin",
        "first * cos + second * sin",
        ("tests/models/test_decoder.py",),
    ),
    Fault(
        "sliding window one token too long",
        "lowrank_optax/models/attention.py",
        "(self.sliding_window - 1, 0)",
        "(self.sliding_window, 0)",
        ("tests/models/test_decoder.py",),
    ),
    Fault(
        "gradient of a stack read by index lost",
        "lowrank_optax/models/remat.py",
        "_value.defjvp(lambda given, tangents: (given[1], tangents[0]))",
        "_value.defjvp(lambda given, tangents: (given[1], 0 * tangents[0]))",
        ("tests/models/test_remat.py",),
    ),
    Fault(
        "every block's input saved where every second was asked for",
        "lowrank_optax/models/remat.py",
        "return run if every == 1 else rematerialised(run, remat, in_scan)",
        "return run",
        ("tests/models/test_remat.py",),
    ),
    Fault(
        "a variable that a block changes taken for one that it passes on",
        "lowrank_optax/training/layered_modules.py",
        "rule=lambda equation, operands: [None] * len(equation.outvars),",
        "rule=lambda equation, operands: operands[:1] * len(equation.outvars),",
        ("tests/training/test_update_in_backward_frozen.py",),
    ),
)

BELOW = (
    Fault(
        "axes of a weight put back in the wrong order",
        "lowrank_optax/matrices/views.py",
        "matrix.transpose(inverse)",
        "matrix.transpose(order)",
        ("tests/matrices/test_views.py",),
    ),
    Fault(
        "lowest bits of a float32 factor lost in a product",
        "lowrank_optax/matrices/arithmetic.py",
        "return high + (middle + low)",
        "return high + middle",
        ("tests/matrices/test_arithmetic.py",),
    ),
    Fault(
        "one scale for an array and not for a block",
        "lowrank_optax/quantization/blocks.py",
        "sizes = jnp.max(jnp.abs(blocks), axis=-1)",
        "sizes = jnp.full(blocks.shape[:-1], jnp.max(jnp.abs(blocks), initial=0.0))",
        ("tests/quantization/test_blocks.py",),
    ),
    Fault(
        "second moments in few bits may be zero",
        "lowrank_optax/states/low_bit.py",
        "BlockFormat(unsigned, size, positive=True)",
        "BlockFormat(unsigned, size)",
        ("tests/states/test_low_bit.py",),
    ),
    Fault(
        "beta1 in the second moment of the fused Adam",
        "lowrank_optax/kernels/adam.py",
        "(1 - s.b2) * jnp.square(gradient)",
        "(1 - s.b1) * jnp.square(gradient)",
        ("tests/states/test_fused.py", "tests/kernels/test_low_bit_adam.py"),
    ),
    Fault(
        "compensated parameters rounded towards zero",
        "lowrank_optax/states/rounding.py",
        "upper = ((raw + 0x8000) >> 16) << 16",
        "upper = (raw >> 16) << 16",
        ("tests/states/test_rounding.py",),
    ),
    Fault(
        "folder copied over the earlier one and not swapped",
        "lowrank_optax/storage/folders.py",
        "_swap(staging, folder)",
        "shutil.copytree(staging, folder, dirs_exist_ok=True)",
        ("tests/models/test_huggingface.py",),
    ),
    Fault(
        "state of a sharded parameter replicated",
        "lowrank_optax/sharding.py",
        "PartitionSpec() if x.sharding is None else x.sharding.spec",
        "PartitionSpec()",
        ("tests/sharded/test_state_shardings.py",),
    ),
)

LOSSES = (
    Fault(
        "chunks of words that forget the largest logit before them",
        "lowrank_optax/losses/linear_head/recompute.py",
        "before.exponentials * scale + jnp.sum(e, axis=1)",
        "before.exponentials + jnp.sum(e, axis=1)",
        ("tests/losses/test_designs.py",),
    ),
    Fault(
        "slope of the soft cap left out of the gradient",
        "lowrank_optax/losses/linear_head/tiles.py",
        "g = g * (1 - jnp.square(a / head.soft_cap))",
        "g = g * 1",
        ("tests/losses/test_linear_cross_entropy.py",),
    ),
    Fault(
        "gradients made in the forward pass not multiplied by the cotangent",
        "lowrank_optax/losses/linear_head/forward.py",
        "(x * factor).astype(like.dtype)",
        "x.astype(like.dtype)",
        ("tests/losses/test_linear_cross_entropy.py",),
    ),
    Fault(
        "hidden states of ignored tokens in the products",
        "lowrank_optax/losses/linear_head/loss.py",
        "rows = jnp.where(counted[:, None], rows, 0)",
        "rows = rows + 0",
        ("tests/losses/test_designs.py",),
    ),
    Fault(
        "a chunk of words without one that counts, not a number",
        "lowrank_optax/losses/linear_head/recompute.py",
        "shift = jnp.where(top == -jnp.inf, 0, top)",
        "shift = top",
        ("tests/losses/test_designs.py",),
    ),
    Fault(
        "a device all of whose words have a bias of -inf, not a number",
        "lowrank_optax/losses/linear_head/tiles.py",
        "p = jnp.exp(a - column(jnp.where(sums.lse == -jnp.inf, 0, sums.lse)))",
        "p = jnp.exp(a - column(sums.lse))",
        ("tests/sharded/test_linear_cross_entropy.py",),
    ),
    Fault(
        "gradients of float16 rounded before the loss scale",
        "lowrank_optax/losses/linear_head/forward.py",
        "half = any(x.dtype == jnp.float16 for x in jax.tree.leaves(operands))",
        "half = False",
        ("tests/losses/test_designs.py",),
    ),
)

FAULTS: tuple[Fault, ...] = (
    *PROJECTION,
    *OPTIMIZERS,
    *TRAINING,
    *ADAPTERS,
    *ACTIVATIONS,
    *LAYERS,
    *LOSSES,
    *MODELS,
    *BELOW,
)
