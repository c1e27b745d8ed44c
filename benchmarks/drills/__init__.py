"""Drills: what a server does when its processes are killed, stopped or told to end, and when clients leave or are too
many. With figures, against goals."""
