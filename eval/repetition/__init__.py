"""How repetitive texts are, in content and in structure, and sets of prompts that provoke it."""
