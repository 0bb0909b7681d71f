"""burnish post-trains language models: one recipe, every stage exact, nothing recomputed."""

__version__ = "0.1.0"
