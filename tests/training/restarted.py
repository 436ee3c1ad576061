"""`functional-sd3` in a process of torchrun, of which one is killed in its fourth step before they are restarted."""

import os
import signal
import sys

from functional_sd3 import cli
from functional_sd3.training import step

if __name__ == "__main__":
    advance = step._advance

    def killed(*args, **kwargs):
        after = advance(*args, **kwargs)
        if int(after.step) == 4 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        return after

    step._advance = killed
    sys.exit(cli.main())
