"""The methods by name, each a recipe over `scale_by_projection` without numerics of its own."""
