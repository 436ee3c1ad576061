"""Functions with rules of their own as single calls for compilers, which would else read them and ignore the rules.

Importing this imports PyTorch's compiler.
"""

import torch

from functional_sd3.kernels import attention_functions, linear_functions

attention = torch.compiler.allow_in_graph(attention_functions.attention)
linear = torch.compiler.allow_in_graph(linear_functions.linear)
