"""Reading and writing what the Hugging Face world holds: models, tokenizers and PEFT adapters."""
