"""Make torch look like what a program expects, in a scope, and put it back."""
