"""`attention_functions.attention` marked as one call for compilers. Importing this imports PyTorch's compiler."""

import torch

from functional_sd3.kernels import attention_functions

attention = torch.compiler.allow_in_graph(attention_functions.attention)
