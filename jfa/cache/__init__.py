"""KV caches as pytrees. They hold memory and never compute attention."""
