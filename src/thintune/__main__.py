"""`python -m thintune`."""

import sys

from thintune.cli import main

sys.exit(main())
