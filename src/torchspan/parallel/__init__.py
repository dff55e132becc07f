"""SimpleFSDP and tensor parallelism on DTensor."""
