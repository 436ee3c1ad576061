"""`python -m functional_sd3` is the command `functional-sd3`."""

import sys

from functional_sd3.cli import main

if __name__ == "__main__":
    sys.exit(main())
