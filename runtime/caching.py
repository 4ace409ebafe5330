"""Feature caching across steps (DeepCache, Ma et al., arXiv 2312.00858): which steps run the whole UNet.

The others run the graph `unet_cached`, its outermost layers, on the deep features that the last whole step left behind.
"""


def whole_steps(total, interval, guided_steps=(0, 0), first_identity_step=0):
    """Return for each of `total` steps whether it runs the whole UNet: every `interval`-th, counted from the last one, and
    the steps that begin the guidance (no earlier one knows the unconditional rows) or the identity.
    """
    whole, age = [], 0
    for step in range(total):
        renew = age % interval == 0 or step in (guided_steps[0], first_identity_step)
        whole.append(renew)
        age = 1 if renew else age + 1
    return whole
