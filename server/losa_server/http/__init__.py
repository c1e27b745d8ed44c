"""HTTP routes and their request bodies. Never imports torch."""
