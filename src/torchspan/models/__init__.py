"""Plain single-device models, readable on their own."""
