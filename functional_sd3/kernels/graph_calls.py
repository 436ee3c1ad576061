"""Functions with rules of their own as single calls for compilers, which would else read them and ignore the rules.

Importing this imports PyTorch's compiler.
"""

import torch

from functional_sd3.kernels import attention_functions, int8_functions, linear_functions

attention = torch.compiler.allow_in_graph(attention_functions.attention)
linear = torch.compiler.allow_in_graph(linear_functions.linear)
linear_int8 = torch.compiler.allow_in_graph(int8_functions.linear_int8)
