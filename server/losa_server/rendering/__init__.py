"""Chat templates, rendered in processes of their own that can be ended. Knows no HTTP and no tokens."""
