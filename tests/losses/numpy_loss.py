"""The loss and its gradients in NumPy float64, token by token, as the formulas are printed."""

from typing import Any

import numpy as np


def numpy_loss(
    hidden: Any,
    head: Any,
    labels: Any,
    *,
    bias: Any = 0.0,
    ignore_label: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    weights: Any = 1.0,
    valid_vocabulary: int | None = None,
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """The mean loss, and its gradients by hidden [T, D], head [D, V] and bias [V]."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    count, size = len(hidden), head.shape[1]
    valid = size if valid_vocabulary is None else valid_vocabulary
    weights = np.broadcast_to(np.asarray(weights, np.float64), count)
    weights = np.where(labels == ignore_label, 0, weights)
    total, loss, by_logits = weights.sum(), 0.0, np.zeros((count, size))
    for t in np.flatnonzero(weights):
        s = (hidden[t] @ head + bias)[:valid]
        a = s if soft_cap is None else soft_cap * np.tanh(s / soft_cap)
        lse = a.max() + np.log(np.exp(a - a.max()).sum())
        target = np.full(valid, label_smoothing / valid)
        target[labels[t]] += 1 - label_smoothing
        loss += weights[t] / total * (lse - target @ a + z_loss * lse**2)
        slope = np.exp(a - lse) * (1 + 2 * z_loss * lse) - target
        chain = 1 if soft_cap is None else 1 - np.tanh(s / soft_cap) ** 2
        by_logits[t, :valid] = weights[t] / total * slope * chain
    return loss, by_logits @ head.T, hidden.T @ by_logits, by_logits.sum(axis=0)
