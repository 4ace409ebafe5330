"""PIDiff: identity-personalised diffusion, from training to the edge.

Nothing is imported here, so that `pidiff.runtime` works without torch.
"""
