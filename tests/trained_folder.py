"""A model folder after two steps of every stage, for the tests of training."""

from pidiff.train.__main__ import main

STAGES = ("vae", "encoder", "matting", "mapper", "base")


def run(stage, data, model, *more):
    return main([stage, "--data", str(data), "--model", str(model), "--steps", "2", "--batch-size", "4", "--save-every", "1", *more])


def train_all(data, model):
    for stage in STAGES:
        assert run(stage, data, model) == 0, stage
    return model
