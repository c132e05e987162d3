"""One file a method: which arrays it has, and what they add to a layer."""
