"""A Compiled on disk: a manifest that is checked first, then payloads."""
