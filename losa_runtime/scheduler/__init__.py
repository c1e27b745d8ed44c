"""Which requests run and on which pages. Knows no attention, no model and no kernel."""
