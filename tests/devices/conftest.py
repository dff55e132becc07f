"""Device rules in force."""

from device_modes import followed, followed_throughout, redirected, redirected_throughout  # noqa: F401
