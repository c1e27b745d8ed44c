"""The KV page pool, its page summaries and the radix tree over whole blocks. Knows no model and no method."""
