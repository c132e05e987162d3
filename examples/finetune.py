"""Adapt a language model to other text with adapters, and compare them.

    python examples/finetune.py
    python examples/finetune.py --from runs/pretrain/adamw --adapter dora --set rank=16
    python examples/finetune.py --hf models/Llama-3.2-1B --data 'letters/*.txt' --remat
    python examples/finetune.py --resume

Plain Flax NNX, optax, grain and Orbax: the functions down to `train` are meant to be copied.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
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
    from _adapters import (
        Parts,
        attach,
        equal_parameters,
        parameter_count,
        put_together,
        take_apart,
        trained_filter,
    )
    from _base_model import Base, find_base
    from _batch_size import Feed
    from _compaction import state_bytes
    from _finetune_report import plot, report
    from _finetune_settings import FinetuneSettings, parse
    from _finished import CheckError, save_merged, save_peft
    from _machine import first_interrupt, make_mesh, peak_bytes
    from _optimizers import make_schedule
    from _options import one_line
    from _recipes import RECIPES, Adapted, Chosen, choose
    from _report import Meter, summarize
    from _run_folder import (
        StepLog,
        command_to_resume,
        load_settings,
        open_folder,
        read_json,
        write_json,
    )
    from _settings import InputError
    from _start import Start, make_start
    from flax import nnx
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    import optax
    import orbax.checkpoint as ocp
    from pretrain import LOSSES, Loss, held_out_loss, plain_loss, restore, sample, save
    from rich.console import Console
    import safetensors  # noqa: F401  (not found only when a trained model is saved, otherwise)

    import lowrank_optax as lro
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(
        f"finetune.py: error: {error.name} is missing; it comes with the extra `examples`: "
        "pip install 'lowrank-optax[examples]'",
        file=sys.stderr,
    )
    sys.exit(2)


def loss_of(
    trained: Any, counts: Any, rest: Any, tokens: jax.Array, graphdef: nnx.GraphDef, loss_fn: Loss
) -> tuple[jax.Array, Any]:
    """The loss of tokens [batch, length + 1], and the dropout's counts after this call."""
    model = nnx.merge(graphdef, trained, counts, rest)
    loss = loss_fn(model, model.hidden(tokens[:, :-1]), tokens[:, 1:])
    return loss, nnx.as_pure(nnx.state(model, nnx.RngCount))


def train_step(
    trained: Any,
    opt_state: optax.OptState,
    counts: Any,
    rest: Any,
    tokens: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformationExtraArgs,
    loss_fn: Loss = plain_loss,
) -> tuple[Any, optax.OptState, Any, jax.Array]:
    """One step on tokens [batch, length + 1]: gradients of what is trained, of nothing else."""
    (loss, counts), gradient = jax.value_and_grad(loss_of, has_aux=True)(
        trained, counts, rest, tokens, graphdef, loss_fn
    )
    updates, opt_state = tx.update(gradient, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state, counts, loss


def train_step_in_backward(
    trained: Any,
    opt_state: optax.OptState,
    counts: Any,
    rest: Any,
    tokens: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    wrt: nnx.filterlib.Filter,
    loss_fn: Loss = plain_loss,
) -> tuple[Any, optax.OptState, Any, jax.Array]:
    """As `train_step`, but each block is updated as soon as its gradients exist.

    Dropout draws from a key of the step, not from the model's streams.
    """
    model = nnx.merge(graphdef, trained, counts, rest)
    update = lro.update_in_backward(model, tx, loss=loss_fn, wrt=wrt)
    batch = tokens[:, :-1], tokens[:, 1:]
    trained, opt_state, loss, _ = update.step(trained, opt_state, batch, step_key(model), rest)
    return trained, opt_state, jax.tree.map(lambda n: n + 1, counts), loss


def step_key(model: nnx.Module) -> jax.Array | None:
    """A key for the dropout of one step, from the model's streams; None without dropout."""
    keys, counts = (
        [jnp.ravel(x)[0] for x in jax.tree.leaves(nnx.state(model, kind))]
        for kind in (nnx.RngKey, nnx.RngCount)
    )
    return jax.random.fold_in(keys[0], counts[0]) if keys else None


def chosen_step(job: "Job") -> Callable[..., Any]:
    """The training step that the settings name."""
    loss_fn = LOSSES[job.settings.loss]
    if not job.settings.update_in_backward:
        return functools.partial(train_step, loss_fn=loss_fn)
    wrt = trained_filter(job.adapter)
    return functools.partial(train_step_in_backward, wrt=wrt, loss_fn=loss_fn)


def loss_on(
    windows: jax.Array,
    trained: Any,
    counts: Any,
    rest: Any,
    *,
    graphdef: nnx.GraphDef,
    loss_fn: Loss = plain_loss,
) -> jax.Array:
    """Mean loss over windows [batches, batch, length + 1]."""
    params = nnx.merge_state(trained, counts, rest)
    return held_out_loss(params, windows, graphdef=graphdef, loss_fn=loss_fn)


class Job(NamedTuple):
    """What it takes to train one adapter."""

    adapter: Chosen
    schedule: optax.Schedule
    base: Base
    settings: FinetuneSettings
    mesh: jax.sharding.Mesh


def begin(
    job: Job, start: Start
) -> tuple[Parts, optax.GradientTransformationExtraArgs, optax.OptState]:
    """Attaches the adapter to the model, and makes its optimizer and the optimizer's state."""
    on_all = NamedSharding(job.mesh, PartitionSpec())
    model = attach(start.model(), job.adapter, job.settings.where, job.settings.seed)
    tx = job.adapter.optimizer(job.schedule, Adapted(model, job.settings.steps))
    parts = take_apart(model, job.adapter)
    # A copy, because a step's donation would take the weights from the next adapter.
    trained = jax.device_put(jax.tree.map(jnp.copy, parts.trained), on_all)
    counts, rest = jax.device_put((parts.counts, parts.rest), on_all)
    opt_state = jax.jit(tx.init, out_shardings=on_all)(trained)
    return parts._replace(trained=trained, counts=counts, rest=rest), tx, opt_state


def train(
    job: Job, start: Start, folder: Path, console: Console, stop: threading.Event
) -> dict[str, Any] | None:
    """Trains one adapter, from its latest checkpoint if there is one.

    Returns the figures for the table, or None if `stop` was set.
    """
    settings, loop = job.settings, job.settings.loop()
    shared_out = NamedSharding(job.mesh, PartitionSpec("data"))
    parts, tx, opt_state = begin(job, start)
    trained, counts, rest = parts.trained, parts.counts, parts.rest
    loss_fn = LOSSES[settings.loss]
    evaluate = jax.jit(functools.partial(loss_on, graphdef=parts.evaluation, loss_fn=loss_fn))
    feed = Feed(job.base.text, loop)

    checkpoints = (folder / "checkpoints").resolve()
    keep = ocp.CheckpointManagerOptions(max_to_keep=2)
    meter = Meter(console, job.adapter.name, loop)
    with ocp.CheckpointManager(checkpoints, options=keep) as manager:
        step = manager.latest_step() or 0
        if step:
            (trained, counts), opt_state, position = restore(manager, (trained, counts), opt_state)
            feed.go_to(position)
        compiled, compile_seconds = None, None
        # Also what was logged before the first step goes, if that is where it starts.
        with closing(StepLog(folder / "log.jsonl", step or -1)) as log, meter.running(feed.done):
            if step == 0:
                log.add_held_out(0, evaluate(start.windows, trained, counts, rest))
            while not feed.finished:
                tokens = jax.device_put(feed.next()[0], shared_out)
                if compiled is None:
                    meter.compiling()
                    step_fn = functools.partial(chosen_step(job), graphdef=parts.training, tx=tx)
                    compiled, compile_seconds = compile_step(
                        job.mesh, step_fn, trained, opt_state, counts, rest, tokens
                    )
                    log.restart_clock()
                trained, opt_state, counts, loss = compiled(
                    trained, opt_state, counts, rest, tokens
                )
                step += 1
                feed.take(None)
                log.add(step, loss)
                last, stopped = feed.finished, stop.is_set()
                if last or feed.passed(settings.eval_every):
                    log.add_held_out(step, evaluate(start.windows, trained, counts, rest))
                    meter.line(feed.done, log)
                if last or feed.passed(settings.checkpoint_every) or stopped:
                    log.flush()
                    save(manager, step, (trained, counts), opt_state, feed.position())
                    log.restart_clock()
                meter.update(feed.done, log)
                if stopped and not last:
                    return None

    parts = parts._replace(trained=trained, counts=counts)
    old = start.old_windows
    return summarize(folder / "log.jsonl", loop, None) | {
        "rank": job.adapter.rank,
        "trained": parameter_count(trained),
        "optimizer_state_bytes": state_bytes(opt_state),
        "compiled_peak_bytes": None if compiled is None else peak_bytes(compiled),
        "compile_seconds": compile_seconds,
        "old_text_loss": None if old is None else float(evaluate(old, trained, counts, rest)),
        **save_all(job, start, parts, folder),
    }


def compile_step(
    mesh: jax.sharding.Mesh, step: Callable[..., Any], *arguments: Any
) -> tuple[jax.stages.Compiled, float]:
    """Compiles `train_step` for these arguments; returns it and the seconds this took."""
    began = time.perf_counter()
    jitted = jax.jit(
        step,
        donate_argnums=(0, 1, 2),  # the frozen weights stay where they are
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    return jitted.lower(*arguments).compile(), time.perf_counter() - began


def save_all(job: Job, start: Start, parts: Parts, folder: Path) -> dict[str, Any]:
    """Saves what was trained, checks that the files hold it, and lets the merged model write.

    Raises:
      CheckError: if what was saved gives other numbers.
    """
    tokens = start.windows[0, :, :-1]
    method, base = job.adapter.method(), job.base
    written, merged, peft = put_together(parts), None, None
    if method is None or method.has_delta:
        to = folder / "merged"
        written, merged = save_merged(parts, to, base.tokenizer, tokens, method is not None)
    if method is not None:
        peft = save_peft(parts, start.model(), folder / "peft", tokens, base.folder)
    return {
        "merged_difference": merged,
        "peft_difference": peft,
        "sample": sample(written, base.text, job.settings.seed),
    }


def check(job: Job) -> None:
    """Checks by shapes alone that the adapter can be attached to the model and trained.

    Raises:
      InputError: if it cannot.
    """
    settings, chosen = job.settings, job.adapter
    tokens = jax.ShapeDtypeStruct((settings.batch_size, settings.sequence_length + 1), jnp.int32)

    def step(tokens: jax.Array) -> Any:
        model = attach(job.base.make(), chosen, settings.where, settings.seed)
        tx = chosen.optimizer(job.schedule, Adapted(model, settings.steps))
        parts = take_apart(model, chosen)
        arguments = parts.trained, tx.init(parts.trained), parts.counts, parts.rest, tokens
        step = chosen_step(job)
        return arguments[:3], step(*arguments, graphdef=parts.training, tx=tx)[:3]

    try:
        before, after = jax.eval_shape(step, tokens)
    except InputError:
        raise
    except Exception as error:  # whatever a method raises, it is the user's choice
        flag = " with --update-in-backward" if settings.update_in_backward else ""
        message = f"{chosen.name} cannot adapt this model{flag}: {one_line(error)}"
        raise InputError(message) from None
    types = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (before, after)]
    if types[0] != types[1]:
        raise InputError(f"{chosen.name} cannot adapt this model: its state changes in a step")


def prepare(settings: FinetuneSettings) -> list[Job]:
    """Finds everything that the settings name, and checks that it fits together.

    Raises:
      InputError: if it does not.
    """
    loop = settings.loop()
    chosen = choose(
        settings.adapters, settings.set, settings.learning_rate, settings.rank, settings.alpha
    )
    mesh = make_mesh(loop)
    base = find_base(settings)
    if settings.equal_parameters:
        chosen = equal_parameters(chosen, base.make, settings.where, settings.seed)
    warmup = settings.steps // 10 if settings.warmup is None else settings.warmup
    schedule = make_schedule(settings.schedule, settings.steps, warmup)
    jobs = [Job(each, schedule, base, settings, mesh) for each in chosen]
    for job in jobs:
        check(job)
    return jobs


def run(argv: Sequence[str] | None) -> int:
    """Prepares everything, then trains one adapter after the other and reports."""
    given, folder, resume = parse(argv, tuple(RECIPES))
    settings = load_settings(folder, given, resume, FinetuneSettings)
    jobs = prepare(settings)
    base, mesh = jobs[0].base, jobs[0].mesh
    open_folder(folder, settings, base.text.fingerprint)

    console = Console(highlight=False, soft_wrap=True)
    results: dict[str, dict[str, Any]] = {}
    with first_interrupt() as stop:
        start = make_start(base, settings, mesh, folder, console, stop)
        if start is None:
            return stopped(console, folder)
        console.print(
            f"{base.name} adapted to {base.text.describe()}; on {mesh.size} {jax.default_backend()}"
        )
        for job in jobs:
            name = job.adapter.name
            (folder / name).mkdir(exist_ok=True)
            console.print(job.adapter.describe(settings.schedule))
            saved = read_json(folder / name / "result.json")
            result = saved or train(job, start, folder / name, console, stop)
            if result is None:
                return stopped(console, folder)
            write_json(folder / name / "result.json", result)
            results[name] = result
    write_json(folder / "results.json", {"before": start.figures} | results)
    logs = {name: folder / name / "log.jsonl" for name in results}
    plot(folder / "curves.png", logs, start.figures, results)
    report(console, start.figures, results, folder)
    return 0


def stopped(console: Console, folder: Path) -> int:
    """Says how to go on; returns the exit status."""
    console.print(f"stopped and saved; to go on: {command_to_resume(folder)}")
    return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    try:
        return run(argv)
    except InputError as error:
        print(f"finetune.py: error: {error}", file=sys.stderr)
        return 2
    except CheckError as error:
        print(f"finetune.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("finetune.py: stopped; the checkpoints made so far remain", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
