"""Exporters for other programs: a run's tokens, and its LoRA adapter, as diffusers, A1111, ComfyUI and InvokeAI read
them.
"""
