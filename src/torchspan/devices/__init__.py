"""System 2: what a request for a device means here; one rule per file."""
