"""The tensors of one layer, as PyTorch has them and as matrices ``[d_in, d_out]``.

PyTorch stores a linear layer as [out, in]: every factor is transposed here, once. Fused heads are
their matrix: ``[d, heads, head_dim]`` has PyTorch's ``heads * head_dim`` outputs, in that order.
"""

from collections.abc import Mapping
import dataclasses
from typing import Literal

import numpy as np

Kind = Literal["linear", "embedding", "convolution"]
Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the tensors of a layer lie.

    Attributes:
      kind: Which of three.
      d_in: Inputs of its matrix; of a convolution, ``window * channels``; of an embedding, rows.
      d_out: Outputs.
      window: Spatial sizes of a convolution's kernel.
      inputs_first: Whether PyTorch's weight is [in, out], as in transformers' Conv1D; the factors
        are as of any linear layer.
    """

    kind: Kind
    d_in: int
    d_out: int
    window: tuple[int, ...] = ()
    inputs_first: bool = False

    def shapes(self, rank: int, dora: bool = False) -> dict[str, tuple[int, ...]]:
        """Names (after the module's) and shapes of the tensors of an adapter."""
        if self.kind == "embedding":
            return {"lora_embedding_A": (rank, self.d_in), "lora_embedding_B": (self.d_out, rank)}
        ones = (1,) * len(self.window)
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A.weight": (rank, *self._inputs),
            "lora_B.weight": (self.d_out, rank, *ones),
        }
        if dora:
            of_convolution = (1, self.d_out, *ones) if self.window else (self.d_out,)
            shapes["lora_magnitude_vector"] = of_convolution
        return shapes

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """PyTorch's shape of the weight."""
        if self._as_matrix:
            return self.d_in, self.d_out
        return self.d_out, *self._inputs

    def pack(self, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray | None = None) -> Tensors:
        """The tensors of an adapter with factors ``a [d_in, r]`` and ``b [r, d_out]``."""
        shapes = self.shapes(a.shape[1], magnitude is not None)
        tensors = [self._outputs_first(a), b.T]
        tensors += [] if magnitude is None else [magnitude]
        return {
            name: np.ascontiguousarray(tensor.reshape(shape))
            for (name, shape), tensor in zip(shapes.items(), tensors, strict=True)
        }

    def unpack(self, tensors: Tensors) -> tuple[np.ndarray, np.ndarray]:
        """The factors, the inverse of `pack`, in float32."""
        a, b = (tensors[name].astype(np.float32) for name in list(self.shapes(1))[:2])
        return self._outputs_last(a), b.reshape(b.shape[:2]).T

    def pack_weight(self, matrix: np.ndarray) -> np.ndarray:
        """PyTorch's tensor of a weight ``[d_in, d_out]``, in its dtype."""
        if self._as_matrix:
            return np.ascontiguousarray(matrix)
        return np.ascontiguousarray(self._outputs_first(matrix).reshape(self.weight_shape))

    def unpack_weight(self, tensor: np.ndarray) -> np.ndarray:
        """The weight as a matrix, the inverse of `pack_weight`."""
        return tensor if self._as_matrix else self._outputs_last(tensor)

    @property
    def _as_matrix(self) -> bool:
        """Whether PyTorch's weight is the matrix itself."""
        return self.kind == "embedding" or self.inputs_first

    @property
    def _inputs(self) -> tuple[int, ...]:
        """PyTorch's axes of inputs: channels first."""
        window = int(np.prod(self.window, dtype=int))
        return self.d_in // window, *self.window

    def _outputs_first(self, matrix: np.ndarray) -> np.ndarray:
        """``[window * channels, k]`` to ``[k, channels, *window]``."""
        if not self.window:
            return matrix.T
        channels = self._inputs[0]
        kernel = matrix.reshape(*self.window, channels, matrix.shape[1])
        return np.moveaxis(kernel, (-1, -2), (0, 1))

    def _outputs_last(self, tensor: np.ndarray) -> np.ndarray:
        if not self.window:
            return tensor.T
        return np.moveaxis(tensor, (0, 1), (-1, -2)).reshape(self.d_in, tensor.shape[0])
