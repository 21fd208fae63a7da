"""Runs `python -m hynb.generate`."""

import sys

from hynb.generate.generation import main

sys.exit(main())
