"""KV caches as pytrees. They only store keys and values; they compute no attention."""
