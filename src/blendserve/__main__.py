"""`python -m blendserve` is the `blendserve` command."""

import sys

from blendserve.cli import main

sys.exit(main())
