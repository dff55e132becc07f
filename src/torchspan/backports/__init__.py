"""System 0: one torch name (or module) that an older torch lacks, per file, as a working implementation.

A backport is a file with a constant ``BACKPORT`` (see `torchspan.backports._base.Backport`).
"""
