"""Graph → Graph; one pass per file, valid in, valid out."""
