"""From a checkpoint to images. In a script or notebook of one's own (docs/PYTHON.md):

    import generation

    model = generation.load("RUN or FILE")
    images = model.sample(["DR", "FLD"], n=8, seed=0, steps=50)  # uint8 (8, H, W, 3)
"""


def load(path, weights="ema", device=None, **said):
    """The trained model in a checkpoint file or run folder -> TrainedModel (generation/trained.py), ready to sample.

    weights: "ema" (averaged), "model" (raw) or "ema:DECAY". device: a GPU where there is one, else the CPU.
    said: image_size=, vae=, ... of a file that does not say them, as published ones do not. Raises UserError.
    """
    from core.errors import UserError
    from core.runs import checkpoint_file
    from generation import trained  # here: the other modules of the room are imported without it

    if unknown := [name for name in said if name not in trained.KNOWN]:
        raise UserError(f"{unknown[0]}: expected some of {', '.join(trained.KNOWN)}")
    file = checkpoint_file(path, "path")
    checkpoint, _ = trained.read(file, said, weights)
    return trained.open_trained(file, checkpoint, weights, device)
