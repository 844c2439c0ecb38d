"""torch.nn.functional.scaled_dot_product_attention on fastattn, for code that calls torch's function.

    with fastattn.integrations.torch.use():
        model(x)

A torch function mode sees every call of torch's function from Python, whoever imported it and when, and while it is
active torch's modules leave their native fast path. torch's own function runs what fastattn should not.
"""

from .checkpoints import bind_checkpoints
from .explanation import Explanation, explain
from .switch import use

__all__ = ["Explanation", "explain", "use"]

bind_checkpoints()
