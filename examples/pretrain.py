"""Pre-train a small language model on text, and compare optimizers while at it.

    python examples/pretrain.py
    python examples/pretrain.py --data 'books/*.txt' --optimizer galore --set rank=64
    python examples/pretrain.py --resume

Plain Flax NNX, optax, grain and Orbax: the functions down to `train` are meant to be copied.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
import dataclasses
import functools
import os
from pathlib import Path
import sys
import threading
import time
from typing import Any, NamedTuple

# On a CPU, LAPACK's own threads fight with XLA's for the cores; read when JAX loads LAPACK.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

try:
    from _batch_size import Feed
    from _compaction import compacted, has_adaptive_rank, state_bytes
    from _corpus import Corpus, held_out_windows, load_corpus
    from _curves import plot
    from _guide import guide_weight, without_guides
    from _machine import first_interrupt, make_mesh, peak_bytes
    from _optimizers import (
        Chosen,
        choose,
        in_few_bits,
        make_optimizer,
        make_schedule,
    )
    from _options import one_line
    from _ranks import make_smaller, model_ranks, without_ranks
    from _report import Meter, report, summarize
    from _run_folder import (
        StepLog,
        command_to_resume,
        load_settings,
        open_folder,
        read_json,
        write_json,
    )
    from _settings import InputError, Settings, parse, remat_choice
    from flax import nnx
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    import optax
    import orbax.checkpoint as ocp
    from rich.console import Console

    import lowrank_optax as lro
    from lowrank_optax.models import Decoder, decoder_config, generate
    from lowrank_optax.training import GradientNoise, accumulate_with_noise
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(
        f"pretrain.py: error: {error.name} is missing; it comes with the extra `examples`: "
        "pip install 'lowrank-optax[examples]'",
        file=sys.stderr,
    )
    sys.exit(2)


Loss = Callable[[Decoder, jax.Array, jax.Array], jax.Array]


def plain_loss(model: Decoder, hidden: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy of labels [batch, length], from the hidden states."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(model.logits(hidden), labels)
    return losses.mean()


def chunked_loss(model: Decoder, hidden: jax.Array, labels: jax.Array) -> jax.Array:
    """The same, but never with all logits in memory."""
    head, axis = model.head()
    # Where devices share the tokens, the other design gathers the hidden states.
    design = "auto" if jax.device_count() == 1 else "recompute"
    return lro.losses.linear_cross_entropy(hidden, head, labels, head_axis=axis, design=design)


LOSSES = {"plain": plain_loss, "chunked": chunked_loss}
BALANCE_WEIGHT = 0.01  # of the sum of the layers' load-balance losses, as in WideNet's paper


def mean_loss(
    params: optax.Params,
    graphdef: nnx.GraphDef,
    tokens: jax.Array,
    sketch: lro.layers.Sketch | None = None,
    key: jax.Array | None = None,
    loss_fn: Loss = plain_loss,
    weight_of_guides: jax.Array | None = None,
    ranks: Mapping[str, jax.Array] | None = None,
    *,
    training: bool = False,
) -> jax.Array:
    """The loss of tokens [batch, length + 1].

    With a sketch, the linear layers of the blocks keep that of their input, drawn with the key.
    Guides have the given weight; with a key they are skipped at random. Layers with ranks use these
    many directions. In training, experts have a limited capacity, routers add noise drawn with the
    key, and load-balance losses are added.
    """
    model = nnx.merge(graphdef, params)
    if ranks is not None:
        lro.layers.maestro.set_ranks(model, ranks)
    if weight_of_guides is not None:
        lro.layers.set_guide_weight(model, weight_of_guides, key)
    if sketch is not None and key is not None:
        lro.layers.randomize(model, sketch, rngs=nnx.Rngs(sketch=key))
    if not training or model.experts is None:
        return loss_fn(model, model.hidden(tokens[:, :-1]), tokens[:, 1:])
    hidden, routing = model.hidden_and_routing(tokens[:, :-1], key)
    loss = loss_fn(model, hidden, tokens[:, 1:])
    return loss + BALANCE_WEIGHT * routing.balance_loss.sum()


def loss_and_gradient(
    params: optax.Params,
    graphdef: nnx.GraphDef,
    tokens: jax.Array,
    sketch: lro.layers.Sketch | None = None,
    key: jax.Array | None = None,
    loss_fn: Loss = plain_loss,
    weight_of_guides: jax.Array | None = None,
    ranks: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, optax.Updates, GradientNoise | None]:
    """Averages over the micro-batches of tokens [accumulate, batch, length + 1].

    Where there are several, their gradients also tell how noisy the average is.
    """
    # A key for each sequence, of which a micro-batch takes the first.
    keys = None if key is None else jax.random.split(key, tokens.shape[:2])

    def loss(params: optax.Params, part: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        tokens, keys = part
        first = None if keys is None else keys[0]
        options = sketch, first, loss_fn, weight_of_guides, ranks
        return mean_loss(params, graphdef, tokens, *options, training=True)

    batch = tokens, keys
    if len(tokens) == 1:
        return *jax.value_and_grad(loss)(params, jax.tree.map(lambda x: x[0], batch)), None
    return accumulate_with_noise(loss, params, batch)


def train_step(
    params: optax.Params,
    opt_state: optax.OptState,
    tokens: jax.Array,
    key: jax.Array | None = None,
    weight_of_guides: jax.Array | None = None,
    *,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformationExtraArgs,
    sketch: lro.layers.Sketch | None = None,
    loss_fn: Loss = plain_loss,
    rank_threshold: float | None = None,
) -> tuple[optax.Params, optax.OptState, jax.Array, GradientNoise | None]:
    """One step of the optimizer on tokens [accumulate, batch, length + 1].

    The key is for the sketch, for skipping guides, for the noise of routers, or for the ranks of
    layers whose directions count from the threshold on; it is another at every step.
    """
    rank_key = None
    if rank_threshold is not None and key is not None:
        rank_key, key = jax.random.split(key)
    ranks = model_ranks(graphdef, params, rank_threshold, rank_key)
    options = graphdef, tokens, sketch, key, loss_fn, weight_of_guides, ranks
    loss, gradient, noise = loss_and_gradient(params, *options)
    updates, opt_state = tx.update(
        gradient,
        opt_state,
        params,
        value=loss,  # these three are for optimizers with a line search; others ignore them
        grad=gradient,
        value_fn=lambda p: loss_and_gradient(p, *options)[0],
    )
    return optax.apply_updates(params, updates), opt_state, loss, noise


def train_step_in_backward(
    params: optax.Params,
    opt_state: optax.OptState,
    tokens: jax.Array,
    key: None = None,
    weight_of_guides: None = None,
    *,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    loss_fn: Loss = plain_loss,
) -> tuple[optax.Params, optax.OptState, jax.Array, None]:
    """As `train_step`, but each block is updated as soon as its gradients exist."""
    del weight_of_guides
    count, batch, length = tokens.shape
    update = lro.update_in_backward(
        nnx.merge(graphdef, params), tx, loss=loss_fn, micro_batches=count
    )
    tokens = tokens.reshape(count * batch, length)
    inputs_and_labels = tokens[:, :-1], tokens[:, 1:]
    params, opt_state, loss, _ = update.step(params, opt_state, inputs_and_labels, key)
    return params, opt_state, loss, None


def held_out_loss(
    params: optax.Params,
    windows: jax.Array,
    weight_of_guides: jax.Array | None = None,
    *,
    graphdef: nnx.GraphDef,
    loss_fn: Loss = plain_loss,
    rank_threshold: float | None = None,
) -> jax.Array:
    """Mean loss over windows [batches, batch, length + 1]; nothing is skipped or drawn."""
    ranks = model_ranks(graphdef, params, rank_threshold)
    options = {"loss_fn": loss_fn, "weight_of_guides": weight_of_guides, "ranks": ranks}
    loss = lambda tokens: mean_loss(params, graphdef, tokens, **options)
    return jax.lax.map(loss, windows).mean()


def held_out_routing(
    params: optax.Params, tokens: jax.Array, *, graphdef: nnx.GraphDef
) -> dict[str, jax.Array]:
    """How experts in training share tokens [batch, length + 1], over all layers."""
    _, routing = nnx.merge(graphdef, params).hidden_and_routing(tokens[:, :-1])
    return {
        "balance_loss": routing.balance_loss.mean(),
        "smallest_load": routing.load.min(),
        "largest_load": routing.load.max(),
        "dropped_choices": routing.dropped.mean(),
    }


def save(
    manager: ocp.CheckpointManager, step: int, params: Any, opt_state: Any, position: dict
) -> None:
    """Saves model, optimizer and position in the text."""
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        opt_state=ocp.args.StandardSave(opt_state),
        position=ocp.args.JsonSave(position),
    )
    manager.save(step, args=items)
    manager.wait_until_finished()  # the next step reuses the memory of these arrays


def restore(
    manager: ocp.CheckpointManager, params: Any, opt_state: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Restores the latest checkpoint, each array where its counterpart now lies.

    The optimizer's arrays have the shapes they were saved with: `compact` may have cut them.
    """
    step = manager.latest_step()
    if step is None:
        raise FileNotFoundError(f"{manager.directory} holds no checkpoint.")
    params, opt_state = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, opt_state))
    items = ocp.args.Composite(
        params=ocp.args.StandardRestore(params),
        opt_state=ocp.args.StandardRestore(as_saved(manager.directory, step, opt_state)),
        position=ocp.args.JsonRestore(),
    )
    restored = manager.restore(step, args=items)
    return restored["params"], restored["opt_state"], restored["position"]


def as_saved(checkpoints: Any, step: int, opt_state: Any) -> Any:
    """The optimizer state, as shapes, with those in the checkpoint's metadata."""
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    # Of the handler: a checkpointer warns that an item of a manager has no metadata of its own.
    saved = ocp.PyTreeCheckpointHandler().metadata(checkpoints / str(step) / "opt_state").tree
    shapes = {name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(saved)}
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(shapes[name(path)], x.dtype, sharding=x.sharding),
        opt_state,
    )


class Job(NamedTuple):
    """What it takes to train with one optimizer."""

    optimizer: Chosen
    make_tx: Callable[
        [optax.Schedule, nnx.GraphDef, optax.Params], optax.GradientTransformationExtraArgs
    ]
    schedule: optax.Schedule  # of the learning rate, by steps of the first batch size
    corpus: Corpus
    settings: Settings
    mesh: jax.sharding.Mesh


def train(job: Job, folder: Path, console: Console, stop: threading.Event) -> dict | None:
    """Trains with one optimizer, from its latest checkpoint if there is one.

    Returns the figures for the table, or None if `stop` was set.
    """
    settings, corpus = job.settings, job.corpus
    on_all = NamedSharding(job.mesh, PartitionSpec())  # model and optimizer: a copy on each
    shared_out = NamedSharding(job.mesh, PartitionSpec(None, "data"))  # a part of each batch
    make_tx = functools.partial(job.make_tx, job.schedule)
    guide = settings.self_guided is not None
    graphdef, params = nnx.split(make_model(settings, corpus.vocab_size, guide=guide))
    params = jax.device_put(params, on_all)
    opt_state = jax.jit(make_tx(graphdef, params).init, out_shardings=on_all)(params)
    first_bytes, shrinks = state_bytes(opt_state), has_adaptive_rank(opt_state)
    feed = Feed(corpus, settings)
    windows = jax.device_put(held_out_windows(corpus, settings), shared_out)
    options = {"loss_fn": LOSSES[settings.loss], "rank_threshold": settings.rank_threshold}
    evaluate = jax.jit(functools.partial(held_out_loss, **options), static_argnames="graphdef")
    route = jax.jit(held_out_routing, static_argnames="graphdef")
    routing: dict[str, jax.Array] = {}

    checkpoints = (folder / "checkpoints").resolve()
    keep = ocp.CheckpointManagerOptions(max_to_keep=2)
    meter = Meter(console, job.optimizer.name, settings)
    with ocp.CheckpointManager(checkpoints, options=keep) as manager:
        step = manager.latest_step() or 0
        if guide and step >= settings.guided_steps:
            graphdef, params, opt_state = without_guides(graphdef, params, opt_state, make_tx)
        if step:
            params, opt_state, position = restore(manager, params, opt_state)
            feed.go_to(position)
        compiled, compile_seconds = {}, 0.0  # by the number of micro-batches
        with closing(StepLog(folder / "log.jsonl", step)) as log, meter.running(feed.done):
            while not feed.finished:
                tokens = jax.device_put(feed.next(), shared_out)
                inputs = tokens, step_key(settings, step), guide_weight(settings, step)
                arguments = params, opt_state, *inputs, *feed.clock()
                if len(tokens) not in compiled:
                    log.flush()
                    meter.compiling()
                    compiled[len(tokens)], seconds = compile_step(job, graphdef, *arguments)
                    compile_seconds += seconds
                    log.restart_clock()
                params, opt_state, loss, noise = compiled[len(tokens)](*arguments)
                step += 1
                if step == settings.guided_steps:
                    log.flush()
                    parts = without_guides(graphdef, params, opt_state, make_tx)
                    (graphdef, params, opt_state), compiled = parts, {}
                    log.restart_clock()
                feed.take(noise)
                log.add(step, loss, feed.figures())
                last, stopped = feed.finished, stop.is_set()
                if last or feed.passed(settings.eval_every):
                    weight = guide_weight(settings, step)
                    if settings.experts is not None:
                        routing = route(params, windows[0], graphdef=graphdef)
                    loss = evaluate(params, windows, weight, graphdef=graphdef)
                    log.add_held_out(step, loss, routing)
                    meter.line(feed.done, log)
                # After the guides are dropped: that matches the state's arrays by their shapes.
                unguided = step >= settings.guided_steps
                if shrinks and unguided and feed.passed(settings.compact_every) and not last:
                    log.flush()
                    smaller = compacted(opt_state, on_all, console.print)
                    if smaller is not None:
                        opt_state, compiled = smaller, {}
                    log.restart_clock()
                if last or feed.passed(settings.checkpoint_every) or stopped:
                    log.flush()
                    save(manager, step, params, opt_state, feed.position())
                    log.restart_clock()
                meter.update(feed.done, log)
                if stopped and not last:
                    return None

    model = nnx.merge(graphdef, params)
    if (cut := make_smaller(model, settings)) is not None:
        console.print(cut)
    shares = {name: float(x) for name, x in routing.items()}
    if shares:
        console.print(
            "an expert has {smallest_load:.1%} to {largest_load:.1%} of a layer's choices; "
            "{dropped_choices:.1%} of all are dropped in training".format(**shares)
        )
    return summarize(folder / "log.jsonl", settings, job.optimizer.refresh_every) | {
        "optimizer_state_bytes": state_bytes(opt_state),
        "first_optimizer_state_bytes": first_bytes if shrinks else None,
        "compiled_peak_bytes": max(filter(None, map(peak_bytes, compiled.values())), default=None),
        "compile_seconds": compile_seconds,
        "routing": shares or None,
        "sample": sample(model, corpus, settings.seed),
    }


def compile_step(
    job: Job, graphdef: nnx.GraphDef, *arguments: Any
) -> tuple[jax.stages.Compiled, float]:
    """Compiles `train_step` for these arguments; returns it and the seconds this took.

    The sixth argument, if there is one, is where the schedule is: steps do not tell it where they
    have different sizes.
    """
    train = functools.partial(chosen_step(job.settings), graphdef=graphdef)

    def step(
        params: Any, opt_state: Any, tokens: Any, key: Any, weight: Any, *done: jax.Array
    ) -> Any:
        schedule = (lambda count: job.schedule(*done)) if done else job.schedule
        tx = job.make_tx(schedule, graphdef, params)
        return train(params, opt_state, tokens, key, weight, tx=tx)

    began = time.perf_counter()
    jitted = jax.jit(
        step,
        donate_argnums=(0, 1),  # the new weights and state take the place of the old
        out_shardings=NamedSharding(job.mesh, PartitionSpec()),
    )
    return jitted.lower(*arguments).compile(), time.perf_counter() - began


def make_sketch(settings: Settings) -> lro.layers.Sketch | None:
    """What the blocks' linear layers keep of their inputs; None for all of them."""
    if settings.sketch is None:
        return None
    return lro.layers.Sketch(settings.sketch_kind or "stratified", fraction=settings.sketch)


def chosen_step(settings: Settings) -> Callable[..., Any]:
    """The training step that the settings name."""
    loss_fn = LOSSES[settings.loss]
    if settings.update_in_backward:
        return functools.partial(train_step_in_backward, loss_fn=loss_fn)
    options = {"sketch": make_sketch(settings), "rank_threshold": settings.rank_threshold}
    return functools.partial(train_step, loss_fn=loss_fn, **options)


def step_key(settings: Settings, step: int) -> jax.Array | None:
    """The key of all that a step draws, also in a run that is resumed; None if that is nothing."""
    has_guides = guide_weight(settings, step) is not None
    drawn = settings.sketch, settings.linear, settings.experts
    if all(each is None for each in drawn) and not has_guides:
        return None
    return jax.random.fold_in(jax.random.key(settings.seed), step)


def tokens_shape(settings: Settings) -> jax.ShapeDtypeStruct:
    """Shape of the tokens of the first step, [accumulate, batch, length + 1]."""
    shape = settings.first_accumulate, settings.micro_batch_size, settings.sequence_length + 1
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def sample(model: Decoder, corpus: Corpus, seed: int) -> tuple[str, str]:
    """Continues the beginning of the held-out text; returns that beginning and the rest."""
    prompt = jnp.asarray(corpus.held_out[None, :32], jnp.int32)
    tokens = generate(model, prompt, 256, key=jax.random.key(seed), temperature=0.8)[0].tolist()
    return corpus.decode(tokens[: prompt.size]), corpus.decode(tokens[prompt.size :])


def make_model(settings: Settings, vocab_size: int, *, guide: bool = False) -> Decoder:
    """Makes the model that the settings name, with the seed's weights.

    Guides are those of the first phase of `--self-guided`.
    """
    config = decoder_config(settings.model, vocab_size=vocab_size)
    experts = None
    if settings.experts is not None:
        options = {"top_k": min(2, settings.experts), "expert_axis": "expert"}
        experts = lro.layers.Experts(settings.experts, **options)
    # The usual 0.02 suits widths of thousands; a narrow model starts too close to zero with it.
    spread = settings.initializer_range or config.hidden_size**-0.5
    model = Decoder(
        dataclasses.replace(config, initializer_range=spread),
        rngs=nnx.Rngs(settings.seed),
        dtype=settings.dtype,
        param_dtype=settings.stored_dtype,
        remat=remat_choice(settings.remat),
        remat_every=settings.remat_every,
        activation_bits=settings.activation_bits,
        feed_forward=settings.feed_forward,
        guide=guide,
        attention=settings.attention,
        position=settings.position,
        share_blocks=settings.share_blocks,
        experts=experts,
        linear=settings.linear,
    )
    if settings.linear is not None:
        without_ranks(model)
    if settings.fixed_point is not None:
        lro.layers.convert_to_fixed_point(model, settings.fixed_point)
        # At the start, the ranges of any tokens are those of all.
        shape = 8, min(settings.sequence_length, 128)
        tokens = jax.random.randint(jax.random.key(settings.seed), shape, 0, vocab_size)
        lro.layers.calibrate_fixed_point(model, Decoder.hidden, tokens, rule="max")
    return model


def prepare(chosen: Chosen, corpus: Corpus, settings: Settings, mesh: jax.sharding.Mesh) -> Job:
    """Checks by shapes alone that this optimizer can train this model.

    Raises:
      InputError: if it cannot, or there is no such model.
    """
    try:
        guide = settings.self_guided is not None
        model = nnx.eval_shape(lambda: make_model(settings, corpus.vocab_size, guide=guide))
    except (ValueError, OSError) as error:
        raise InputError(f"--model {settings.model}: {one_line(error)}") from None
    graphdef, params = nnx.split(model)
    warmup = settings.steps // 10 if settings.warmup is None else settings.warmup
    schedule = make_schedule(settings.schedule, settings.steps, warmup)

    def make_tx(
        schedule: optax.Schedule, graphdef: nnx.GraphDef, params: optax.Params
    ) -> optax.GradientTransformationExtraArgs:
        model = nnx.merge(graphdef, params)
        tx = make_optimizer(chosen, model, params, schedule, settings.rank_penalty)
        return in_few_bits(tx, settings)

    tx = make_tx(schedule, graphdef, params)
    step = functools.partial(chosen_step(settings), graphdef=graphdef, tx=tx)
    inputs = tokens_shape(settings), step_key(settings, 0), guide_weight(settings, 0)
    try:
        before = params, jax.eval_shape(tx.init, params)
        after = jax.eval_shape(step, *before, *inputs)[:2]
    except Exception as error:  # whatever the optimizer raises, it is the user's choice
        raise InputError(f"{chosen.name} cannot train this model: {one_line(error)}") from None
    types = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (before, after)]
    if types[0] != types[1]:
        raise InputError(f"{chosen.name} cannot train this model: its state changes shape or dtype")
    return Job(chosen, make_tx, schedule, corpus, settings, mesh)


def run(argv: Sequence[str] | None) -> int:
    """Reads settings and text, and trains."""
    given, folder, resume = parse(argv)
    settings = load_settings(folder, given, resume)
    optimizers = choose(settings.optimizers, settings.set, settings.learning_rate)
    mesh = make_mesh(settings)
    corpus = load_corpus(settings.data, settings.tokenizer, settings.sequence_length)
    with jax.set_mesh(mesh) if settings.experts is not None else nullcontext():
        return train_all(optimizers, corpus, settings, mesh, folder)


def train_all(
    optimizers: Sequence[Chosen],
    corpus: Corpus,
    settings: Settings,
    mesh: jax.sharding.Mesh,
    folder: Path,
) -> int:
    """Trains with each optimizer in turn, and reports."""
    jobs = [prepare(chosen, corpus, settings, mesh) for chosen in optimizers]
    open_folder(folder, settings, corpus.fingerprint)

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{corpus.describe()}; {settings.model} on {mesh.size} {jax.default_backend()}")
    results = {}
    with first_interrupt() as stop:
        for job in jobs:
            part = folder / job.optimizer.name
            part.mkdir(exist_ok=True)
            console.print(job.optimizer.describe(settings.schedule))
            result = read_json(part / "result.json") or train(job, part, console, stop)
            if result is None:
                console.print(f"stopped and saved; to go on: {command_to_resume(folder)}")
                return 130
            write_json(part / "result.json", result)
            results[job.optimizer.name] = result
    write_json(folder / "results.json", results)
    plot(folder / "curves.png", {name: folder / name / "log.jsonl" for name in results}, results)
    report(console, results, folder)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    try:
        return run(argv)
    except InputError as error:
        print(f"pretrain.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pretrain.py: stopped; the checkpoints made so far remain", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
