"""The Hugging Face side: checkpoints read, compressed and written; the format known to transformers."""
