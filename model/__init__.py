"""The transformer, its presets, generation with a KV cache, and its closed-form estimates."""
