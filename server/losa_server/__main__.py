"""`python -m losa_server` is the `losa` command."""

from __future__ import annotations

import sys

from losa_server.cli import main

sys.exit(main())
