"""The bytes of a checkpoint: safetensors headers, sources, shard files, the journal, config.json. Imports no torch."""
