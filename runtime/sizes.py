"""Sizes of pictures: what a bundle can make, and decoding in tiles what does not fit memory at once."""

import numpy as np

from .errors import require

OVERLAP = 0.25          # of a tile, shared with the next one and blended
LARGEST = 8192


def latent_shape(bundle, height=None, width=None):
    """Return the shape [c,h,w] of the latents of pictures of height x width pixels (None: the model's own size).

    Raises PidiffError for a size that the bundle's graphs or the UNet's levels cannot make.
    """
    model = bundle.manifest.model
    own, free = model.image_size, is_free(bundle)
    config = bundle.json("unet/config.json") if "unet/config.json" in bundle.manifest.files else {}
    unit = model.vae_scale_factor * 2 ** (len(config.get("block_out_channels", (0,))) - 1)
    sizes = [own if pixels is None else pixels for pixels in (height, width)]
    for name, pixels in zip(("height", "width"), sizes):
        require(free or pixels == own, name, f"be {own} for this bundle, whose graphs have a fixed size", repr(pixels))
        whole = isinstance(pixels, (int, np.integer)) and not isinstance(pixels, bool)
        require(whole and unit <= pixels <= LARGEST and pixels % unit == 0, name, f"be a multiple of {unit} up to {LARGEST}", repr(pixels))
    return (model.latent_channels, *(int(pixels) // model.vae_scale_factor for pixels in sizes))


def is_free(bundle):
    """Return whether the bundle's graphs take pictures of any size."""
    return isinstance(bundle.graph("vae_decoder").inputs[0].shape[-1], str)


def decode_in_tiles(decode, latents, tile, scale):
    """Return `decode(latents)` [B,3,h scale,w scale] float32, put together from tiles of `tile` x `tile` latents that overlap.

    decode: latents [1,c,n,m] -> picture [1,3,n scale,m scale]. Where tiles overlap they are blended linearly. An autoencoder with
    group norms or attention over the whole picture does not see all of it in a tile: colours can differ slightly.
    """
    (batch, _, height, width), side = latents.shape, (min(tile, latents.shape[2]), min(tile, latents.shape[3]))
    rows, columns = _ramp(side[0] * scale), _ramp(side[1] * scale)
    weight = np.outer(rows, columns).astype(np.float32)
    out = np.zeros((batch, 3, height * scale, width * scale), np.float32)
    total = np.zeros(out.shape[2:], np.float32)
    for top in _starts(height, side[0]):
        for left in _starts(width, side[1]):
            there = (slice(top * scale, (top + side[0]) * scale), slice(left * scale, (left + side[1]) * scale))
            total[there] += weight
            for i in range(batch):
                part = np.ascontiguousarray(latents[i:i + 1, :, top:top + side[0], left:left + side[1]])
                out[(i, slice(None), *there)] += weight * decode(part)[0].astype(np.float32)
    return out / total


def _starts(length, side):
    """Return where tiles begin, evenly, the last one ending at `length`."""
    stride = max(1, int(side * (1 - OVERLAP)))
    count = 1 + -(-(length - side) // stride)
    return [round(i * (length - side) / max(1, count - 1)) for i in range(count)]


def _ramp(pixels):
    """Return weights that rise from the ends of a tile over its overlap."""
    edge = (np.minimum(np.arange(pixels), np.arange(pixels)[::-1]) + 0.5) / (pixels * OVERLAP)
    return np.minimum(edge, 1)
