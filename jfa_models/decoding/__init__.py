"""Text generation for one batch: sampling, caches and compiled steps."""
