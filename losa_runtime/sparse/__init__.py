"""What of the prefix is read: one small file per published method. Knows no model and no decoding."""
