"""The model that all adapters of a run start from, and what it can do before any is trained."""

import dataclasses
import functools
import hashlib
from pathlib import Path
import threading
from typing import Any, NamedTuple

from _base_model import Base, load_checkpoint
from _corpus import Corpus, held_out_windows
from _finetune_settings import FinetuneSettings
from _optimizers import choose
from _run_folder import read_json, write_json
from _settings import InputError
from flax import nnx
import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
from pretrain import LOSSES, held_out_loss, prepare, sample, train
from rich.console import Console

from lowrank_optax.models import Decoder


class Start(NamedTuple):
    """The model to adapt, a copy on each device, and the texts to look at it with."""

    graphdef: nnx.GraphDef
    params: Any
    windows: jax.Array  # held-out of the text to adapt to, [batches, batch, length + 1]
    old_windows: jax.Array | None  # of the text before
    figures: dict[str, Any]  # its losses on both, and a sample

    def model(self) -> Decoder:
        """The model anew, without the adapters of another."""
        return nnx.merge(self.graphdef, self.params)


def make_start(
    base: Base,
    settings: FinetuneSettings,
    mesh: jax.sharding.Mesh,
    folder: Path,
    console: Console,
    stop: threading.Event,
) -> Start | None:
    """Loads the model, or makes it first; None if `stop` was set meanwhile.

    Raises:
      InputError: if the model cannot be read, or is not what it was when the run began.
    """
    on_all = NamedSharding(mesh, PartitionSpec())
    load = base.load
    if load is None:
        if not make_base(base, settings, mesh, folder / "base", console, stop):
            return None
        load = functools.partial(load_checkpoint, folder / "base" / "checkpoints", base.make)
    graphdef, params = nnx.split(load())
    # Plain arrays: variables would be shared by all models made of them, and PiSSA changes them.
    params = jax.device_put(nnx.as_pure(params), on_all)
    windows = _windows(base.text, settings, mesh)
    old_windows = None if base.before is None else _windows(base.before, settings, mesh)
    mark = fingerprint(params)
    figures = read_json(folder / "before.json")
    if figures is None:
        loss_fn = LOSSES[settings.loss]
        loss = jax.jit(functools.partial(held_out_loss, graphdef=graphdef, loss_fn=loss_fn))
        figures = {
            "weights": mark,
            "held_out_loss": float(loss(params, windows)),
            "old_text_loss": None if old_windows is None else float(loss(params, old_windows)),
            "sample": sample(nnx.merge(graphdef, params), base.text, settings.seed),
        }
        write_json(folder / "before.json", figures)
    if figures["weights"] != mark:
        raise InputError(f"the model to adapt has changed since the run in {folder} began")
    return Start(graphdef, params, windows, old_windows, figures)


def make_base(
    base: Base,
    settings: FinetuneSettings,
    mesh: jax.sharding.Mesh,
    folder: Path,
    console: Console,
    stop: threading.Event,
) -> bool:
    """Trains the model by the main job; whether it came to the end."""
    assert base.made_of is not None
    own = {name: getattr(settings, name) for name in ("remat", "remat_every", "loss")}
    job_settings = dataclasses.replace(settings.base(), **own)
    folder.mkdir(exist_ok=True)
    if read_json(folder / "result.json") is not None:
        return True
    console.print(
        f"first a model to adapt: {settings.model} trained for {settings.base_steps} steps on the "
        f"code of the standard library, without its documentation ({base.made_of.describe()})"
    )
    optimizer = choose(job_settings.optimizers, [], None)[0]
    result = train(prepare(optimizer, base.made_of, job_settings, mesh), folder, console, stop)
    if result is not None:
        write_json(folder / "result.json", result)
    return result is not None


def _windows(text: Corpus, settings: FinetuneSettings, mesh: jax.sharding.Mesh) -> jax.Array:
    shared_out = NamedSharding(mesh, PartitionSpec(None, "data"))
    return jax.device_put(held_out_windows(text, settings.loop()), shared_out)


def fingerprint(params: Any) -> str:
    """Changes with a weight, but for changes that leave the sums of all arrays as they were."""
    sums = [jax.numpy.sum(x, dtype=jax.numpy.float32) for x in jax.tree.leaves(params)]
    return hashlib.sha256(np.asarray(jax.device_get(sums)).tobytes()).hexdigest()
