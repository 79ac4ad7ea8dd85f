"""The decoder: a pure module of parameters, and its configuration."""
