"""What kernels are checked against: a float64 oracle, the numerics contract, and named cases."""
