"""pidiff-evaluate: what a model does to identity, prompt and background, with intervals over people."""
