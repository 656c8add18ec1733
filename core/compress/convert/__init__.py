"""Makes safetensors of what other programs wrote: pickled checkpoints and GGUF files."""
