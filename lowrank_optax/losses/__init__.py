"""Losses without their large intermediate arrays."""

from lowrank_optax.losses.linear_head.chunking import ChunkPlan, chunk_plan
from lowrank_optax.losses.linear_head.loss import TokenValues, linear_cross_entropy

__all__ = ["ChunkPlan", "TokenValues", "chunk_plan", "linear_cross_entropy"]
