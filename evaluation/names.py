"""Short names that tell sets of generated images apart: the model, and of the rest only what differs."""

import re

LONGEST = 28  # letters of a folder's name
# What is not said of how images were sampled.
USUAL = {"weights": "ema", "heredity": "published", "eta": 0.0, "cfg_interval": None, "shared_fire": False}
WEIGHTS = {"ema": "averaged", "model": "raw"}  # --weights -> in words


def model_of(images):
    """The generator: what the sampler says, else what the folder's name begins with; or the name, cut."""
    name = images.about.get("model") or images.name.partition("-GS-fold-")[0]
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}…"


def weights_of(about):
    """Which weights made the images, in words: averaged, raw, or average DECAY."""
    kind = about.get("weights", "ema")
    return WEIGHTS.get(kind) or f"average {kind.removeprefix('ema:')}"


def way_of(about):
    """How these images were sampled, as text: sampler, steps, guidance, and what is not as usual."""
    way = f"{about.get('sampler', '?')}, {about.get('steps', '?')} steps, guidance {about.get('cfg_scale', '?')}"
    more = [f"{name} {about[name]}" for name, usual in USUAL.items() if about.get(name, usual) != usual]
    return ", ".join([way, *more])


def weights_in_words(about):
    """Whose weights made these images: run, step, and which of its weights; "" where nothing is known."""
    parts = [f"run {about['run']}" if about.get("run") else None,
             f"step {about['step']:,}" if about.get("step") is not None else None,
             f"{weights_of(about)} weights" if "weights" in about else None,
             f"training seed {about['training_seed']}" if about.get("training_seed") is not None else None]
    return ", ".join(filter(None, parts))


def seed_of(images):
    """The seed of sampling: what the sampler says, else what the folder's name does; or None."""
    found = re.search(r"-seed-(\d+)", images.name)
    return images.about.get("seed", found and int(found[1]))


# What may stand behind the model, the most telling first: a function of `about` -> text.
FACTS = (
    weights_of,
    lambda about: f"{about.get('sampler', '?')} {about.get('steps', '?')}",
    lambda about: f"guidance {about.get('cfg_scale', '?'):g}" if "cfg_scale" in about else "guidance ?",
    lambda about: f"heredity {about.get('heredity', 'published')}",
    lambda about: f"step {about.get('step')}",
    lambda about: f"training seed {about.get('training_seed')}",
    lambda about: f"seed {about['seed']}",
    lambda about: f"run {about.get('run')}",
    lambda about: f"weights {about.get('weights_hash', '?')[:6]}")


def distinct(sets):
    """A name for each of these sets (LabelledImages), all of them different.

    A fact stands in the names of all sets of a model, or of none of them; only where no fact helps, they are numbered.
    """
    names, abouts = [model_of(images) for images in sets], [{**s.about, "seed": seed_of(s)} for s in sets]
    for model in {*names}:
        members = [i for i, name in enumerate(names) if name == model]
        for fact in FACTS if len(members) > 1 else ():
            longer = {i: f"{names[i]}, {fact(abouts[i])}" for i in members}
            if len({*longer.values()}) > len({names[i] for i in members}):
                for i in members:
                    names[i] = longer[i]
    for name in {*names}:
        same = [i for i, other in enumerate(names) if other == name]
        for number, i in enumerate(same if len(same) > 1 else (), 1):
            names[i] = f"{name} ({number})"
    return names


def shared(names):
    """What several such names have in common: "GeCA-S" of "GeCA-S, seed 0" and "GeCA-S, seed 1"."""
    first, *others = (re.sub(r" \(\d+\)$", "", name).split(", ") for name in names)
    return ", ".join(part for part in first if all(part in other for other in others))
