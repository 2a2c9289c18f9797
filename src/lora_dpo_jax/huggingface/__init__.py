"""Reads and writes models, tokenizers and PEFT adapters in Hugging Face's formats."""
