"""A pytest plugin for runs with a planted bug: hypothesis may stop at the first example that shows it."""

from __future__ import annotations

from hypothesis import Phase, settings

settings.register_profile("unshrunk", database=None, phases=[Phase.explicit, Phase.generate])
settings.load_profile("unshrunk")
