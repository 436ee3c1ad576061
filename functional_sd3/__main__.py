"""`python -m functional_sd3` is the command `functional-sd3`."""

import sys

from functional_sd3.cli import main

sys.exit(main())
