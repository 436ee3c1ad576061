"""What every process of `tests.processes` would import and make for itself, made once in the server that forks them."""

import gc

import torch
import torch._dynamo  # noqa: F401 (torch.func imports it when it is first used)

import functional_sd3.kernels
import functional_sd3.training.step
import functional_sd3.transformer.mmdit  # noqa: F401
import tests.processes  # noqa: F401

# Before the fork there must be no other thread.
torch.set_num_threads(1)
# PyTorch scripts its own forward-mode derivatives when they are first used, in a third of a second.
torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))
# A search for cycles writes into all that it visits, which would copy every shared page into each process.
gc.collect()
gc.freeze()
