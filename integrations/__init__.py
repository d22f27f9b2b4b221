"""The kernels under other people's models: rooflight.integrations.transformers."""
