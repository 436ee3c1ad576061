"""`kernels.attention.attention` marked as one call for compilers. Importing this imports PyTorch's compiler."""

import torch

from functional_sd3.kernels import attention as differentiable

attention = torch.compiler.allow_in_graph(differentiable.attention)
