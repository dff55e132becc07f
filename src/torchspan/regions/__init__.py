"""What lives at run time: a region of a program, eager at first, compiled once that is ready and proven."""
