"""C kernels for what PyTorch does in many passes on a CPU; built on first use, and never needed (docs/engine.md)."""
