"""KV caches as pytrees. They only store keys and values and do not compute attention."""
