"""Training a ViTok."""
