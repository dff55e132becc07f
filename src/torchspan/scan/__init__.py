"""Which torch a code base needs, read from its files: nothing is imported, nothing is run."""

from torchspan.scan._scan import Finding, Scan, scan

__all__ = ["Finding", "Scan", "scan"]
