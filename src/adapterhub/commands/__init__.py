"""The commands, a file per noun. Each parses, calls one function, prints; heavy imports sit inside them."""
