"""What a kernel is held against: a float64 oracle, the numerics contract, and named cases."""
