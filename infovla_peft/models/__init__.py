"""Vision-language-action models written natively for transformers, without remote code."""
