"""What compiles leave in torch's caches: a ledger of the entries, and entries packed to be sent."""
