"""`python -m megamm.cli`."""

import sys

from megamm.cli import main

sys.exit(main())
