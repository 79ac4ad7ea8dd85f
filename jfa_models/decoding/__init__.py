"""Logits to tokens, for one batch."""
