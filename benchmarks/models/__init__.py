"""Whole models of Hugging Face Transformers, timed with fastattn and with the library's own attention."""
