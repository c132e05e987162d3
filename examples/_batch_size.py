"""What each step reads: as many sequences as are fixed, or as the noise of the gradient asks for.

The noise is measured where a step has several micro-batches: with `--accumulate`, and always with
`--batch-size adaptive`, whose micro-batches stay the same while there are more and more of them.
"""

from typing import Any

from _corpus import Corpus, training_batches
from _settings import Settings
import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax as lro
from lowrank_optax.training import AdaptiveBatchSize, BatchSizeState, GradientNoise

# Two micro-batches tell little and a batch never shrinks: tests go by averages of many steps, and
# the first is not made before there are some.
DECAY = 0.95
TEST_EVERY = 10


def make_controller(settings: Settings) -> AdaptiveBatchSize | None:
    """What watches the noise; None where each step has a single micro-batch."""
    if settings.first_accumulate == 1:
        return None
    first = settings.first_batch_size
    return lro.training.AdaptiveBatchSize(
        initial=first,
        maximum=settings.max_batch_size if settings.batch_size == "adaptive" else first,
        eta=settings.eta,
        micro_batch_size=settings.micro_batch_size,
        decay=DECAY,
        test_interval=TEST_EVERY,
    )


class Feed:
    """The sequences of one step after another, until a budget of them is spent.

    A run reads `steps` times the first batch size, so that runs with different batch sizes are
    trained on the same text. `done` counts in the same unit: with a fixed batch size it is the
    number of steps.
    """

    def __init__(self, corpus: Corpus, settings: Settings) -> None:
        self._first, self._micro = settings.first_batch_size, settings.micro_batch_size
        self._left = settings.steps * self._first
        self._batches = training_batches(corpus, settings, self._micro)
        controller = make_controller(settings)
        self._state: BatchSizeState | None = None if controller is None else controller.init()
        self._observe = None if controller is None else jax.jit(controller.observe)
        self._adaptive = settings.batch_size == "adaptive"
        self._steps, self.done = settings.steps, 0.0
        self.size = self._first  # of the latest step

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self._left == 0

    def next(self) -> np.ndarray:
        """Tokens of the next step, [micro-batches, micro-batch, length + 1]."""
        if self._state is not None and self._adaptive:
            # The last step takes what is left of the budget.
            self.size = min(int(self._state.batch_size), self._left)
        count = self.size // self._micro
        return np.stack([next(self._batches) for _ in range(count)])

    def clock(self) -> tuple[jax.Array, ...]:
        """Where schedules are, if the number of steps does not tell it."""
        return (jnp.float32(self.done),) if self._adaptive else ()

    def take(self, noise: GradientNoise | None) -> None:
        """Counts the step that was just made, and looks at its noise."""
        self._left -= self.size
        self.done = self._steps - self._left / self._first
        if self._observe is not None:
            # Also of no noise: a last step of one micro-batch has none.
            self._state = self._observe(self._state, noise)

    def passed(self, every: int) -> bool:
        """Whether a multiple of `every` was reached by the latest step, in the unit of `done`."""
        return self.done // every > (self.done - self.size / self._first) // every

    def figures(self) -> dict[str, Any]:
        """What the log says of the latest step."""
        noise = {} if self._state is None else {"noise_scale": self._state.noise_scale}
        return noise | ({"batch_size": self.size} if self._adaptive else {})

    def position(self) -> dict[str, Any]:
        """Where the feed is, for a checkpoint in JSON."""
        state = {} if self._state is None else self._state._asdict()
        numbers = {name: x.item() for name, x in state.items()}
        return {"text": self._batches.get_state(), "left": self._left, "batch_size": numbers}

    def go_to(self, position: dict[str, Any]) -> None:
        """Goes on from a `position`."""
        self._batches.set_state(position["text"])
        self._left = position["left"]
        self.done = self._steps - self._left / self._first
        if self._state is not None:
            numbers, fields = position["batch_size"], self._state._asdict()
            arrays = {name: jnp.asarray(numbers[name], x.dtype) for name, x in fields.items()}
            self._state = BatchSizeState(**arrays)
