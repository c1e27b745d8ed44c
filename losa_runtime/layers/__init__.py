"""Plain neural layers shared by the model families. Knows no cache and no request."""
