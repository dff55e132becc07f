"""Device rules in force."""

from device_modes import followed, redirected  # noqa: F401
