"""Training stages: vae, encoder, matting, base, adapter. Run `pidiff-train --help`."""
