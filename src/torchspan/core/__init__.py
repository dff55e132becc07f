"""The nouns that every other folder speaks in; imports nothing of torchspan and no private torch name."""
