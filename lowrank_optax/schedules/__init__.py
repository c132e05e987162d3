"""What changes from step to step: learning rates and momenta, batch sizes, weight decay."""

__all__: list[str] = []
