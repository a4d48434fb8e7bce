"""The installed command ``spas-attn``: tune, generate, compare, verify and measure, for every family of models."""
