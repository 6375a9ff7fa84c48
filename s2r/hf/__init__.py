"""Hugging Face folders: config.json, safetensors, tokenizer and chat template, read and written directly."""
