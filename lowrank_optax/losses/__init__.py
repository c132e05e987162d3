"""Losses without their large intermediate arrays."""

from lowrank_optax.losses.linear_head.loss import TokenValues, linear_cross_entropy
from lowrank_optax.losses.linear_head.plan import ChunkPlan, chunk_plan

__all__ = ["ChunkPlan", "TokenValues", "chunk_plan", "linear_cross_entropy"]
