"""fastattn as an attention implementation of Hugging Face Transformers.

from fastattn.integrations import huggingface

huggingface.register()
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")
"""

from .attention import attention_forward
from .registration import register

__all__ = ["attention_forward", "register"]
