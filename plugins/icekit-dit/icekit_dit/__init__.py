"""Diffusion transformers as backbones of icekit, and what reads and teaches them better than attention and rows do."""
