"""System 1: how a Program becomes Regions, compiled inside a Budget."""
