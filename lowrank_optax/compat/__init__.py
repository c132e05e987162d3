"""Every use of an unstable or private interface of JAX and Flax; each assumption has a test."""
