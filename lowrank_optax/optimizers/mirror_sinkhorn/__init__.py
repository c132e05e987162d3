"""Mirror Sinkhorn: online minimisation over couplings, matrices with given row and column sums."""
