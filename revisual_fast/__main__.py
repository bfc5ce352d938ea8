"""``python -m revisual_fast`` is the command ``revisual-fast``."""

import sys

from revisual_fast.cli import main

sys.exit(main())
