"""The Hugging Face folder: config.json, safetensors, tokenizer.json and the chat template, read and written directly."""
