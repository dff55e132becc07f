"""Work in a child process that can be killed: its budget, its server, what is sent to it and back."""
