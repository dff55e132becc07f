"""torch's private names that torchspan uses, a file for each part of torch: where a new torch breaks us, it breaks here."""
