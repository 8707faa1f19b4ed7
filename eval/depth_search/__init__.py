"""Chain of layers (CoLa, arXiv 2507.07996): which of a model's own layers a question needs, and how often each."""
