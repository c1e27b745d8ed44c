"""Measurements of the runtime: speed, quality, and the small model they run on."""
