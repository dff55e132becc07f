"""Program → Graph, and Program → graph, bytecode and guards."""
