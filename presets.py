"""Every setting of the paper's tables and of our own runs, one row each, with its source: `--preset NAME`.

A preset fills in what a command line leaves out; `--dry-run` prints what comes of it. Each row has sections, for the
scripts that read it: "extract", "train", "sample" (both samplers), "expand" (sample_ddp.py), "classify", "table"
(scripts/table1.sh and table2.sh). Nothing else holds a copy of these numbers.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """One row: what a script is told, by name of the flag, and where the numbers come from."""

    description: str
    source: str
    settings: dict = field(default_factory=dict)  # section -> flag -> value


PAPER = "Elbatel et al., MICCAI 2024 (arXiv 2407.03018), Sec. 3 and the released commands"
FDDM = "classifier of the same group on the same data (FDDM, MICCAI 2023): the paper names none"

# The numbers of the paper, which are also the defaults of the scripts.
PAPER_SPACE = {"image_size": 256, "vae": "ema"}
PAPER_TRAINING = {"epochs": 14000, "global_batch_size": 128, "optimizer": "adamw", "lr": 1e-4,
                  "lr_schedule": "constant", "warmup": 0, "adam_betas": [0.9, 0.999], "clip_norm": 0, "min_snr": 0,
                  "train_heredity": 0, "ema_decay": 0.9999}
PAPER_SAMPLING = {"num_sampling_steps": 250, "sampler": "ddpm", "cfg_scale": 1.5, "heredity": "published"}
VALIDATION_SAMPLING = {**PAPER_SAMPLING, "num_sampling_steps": 25, "sampler": "dpmpp"}  # ours: a tenth of its time
PAPER_EXPANSION = 5  # synthetic images per training image, for Table 2
PAPER_CLASSIFIER = {"backbone": "resnet50.tv_in1k", "image_size": 448, "augment": "geometric", "optimizer": "sgd",
                    "global_batch_size": 8, "epochs": 80}
OPTIMISERS = {"sgd": {"lr": 1e-3, "weight_decay": 1e-4}, "adamw": {"lr": 1e-4, "weight_decay": 1e-2}}  # ours: adamw
PAPER_VALIDATION_EPOCHS = 700  # epochs between validations
PAPER_DATA = {"fundus": "RetinaMNIST, 5", "oct": "TOPCON-MM, 11"}
PAPER_MODELS = ("LDM-B", "DiT-S", "GeCA-S")

PRESETS = {
    f"paper-{data}-{model.lower()}": Preset(
        f"{model}, {data} ({labels} labels), Tables 1 and 2; 4 GPUs, --mixed_precision fp16", f"{PAPER}; {FDDM}",
        {"extract": PAPER_SPACE, "train": {"model": model, "validate_every": PAPER_VALIDATION_EPOCHS, **PAPER_SPACE,
                                           **PAPER_TRAINING, **PAPER_SAMPLING},
         "sample": PAPER_SAMPLING, "expand": {"expand_ratio": PAPER_EXPANSION},
         "classify": PAPER_CLASSIFIER})
    for data, labels in PAPER_DATA.items() for model in PAPER_MODELS}

PRESETS["paper"] = Preset("Tables 1 and 2 whole: all models and folds", f"{PAPER}; {FDDM}", {"table": {
    **PAPER_SPACE, "models": list(PAPER_MODELS[::-1]), "epochs": PAPER_TRAINING["epochs"],
    "batch": PAPER_TRAINING["global_batch_size"], "validate_every": PAPER_VALIDATION_EPOCHS,
    "steps": PAPER_SAMPLING["num_sampling_steps"], "sampler": PAPER_SAMPLING["sampler"],
    "expand": PAPER_EXPANSION, "backbone": PAPER_CLASSIFIER["backbone"],
    "classify_size": PAPER_CLASSIFIER["image_size"], "classify_epochs": PAPER_CLASSIFIER["epochs"]}})

# Ours: what a CPU or a small GPU can train. Learning rates from one grid for all models (docs/LEARNING.md).
MEASURED = "measured: docs/LEARNING.md"
SMALL_SPACE = {"image_size": 64, "vae": "retina"}  # 8 × 8 cells
SMALL_RATES = {"GeCA-XS": 4e-3, "DiT-S": 4e-3, "LDM-B": 2e-3}  # of Muon
QUICKSTART = {"lr": 2e-3}  # of Muon, from weights that are trained already
SMALL_SAMPLING = {"sampler": "ddim", "num_sampling_steps": 25, "cfg_scale": 1.5}
SMALL_TRAINING = {**SMALL_SPACE, **SMALL_SAMPLING, "epochs": 120, "global_batch_size": 32, "optimizer": "muon",
                  "lr_schedule": "linear", "warmup": 50, "clip_norm": 1, "ema_decay": 0.999}

PRESETS |= {
    f"small-{model.lower()}": Preset(
        f"{model} at 64 px with the bundled autoencoder", MEASURED,
        {"extract": SMALL_SPACE, "train": {"model": model, "lr": lr, **SMALL_TRAINING}, "sample": SMALL_SAMPLING})
    for model, lr in SMALL_RATES.items()}
PRESETS["quickstart"] = Preset(
    "GeCA-XS for some minutes from the bundled weights: quickstart.sh", MEASURED,
    {"train": {"model": "GeCA-XS", **SMALL_TRAINING, **QUICKSTART}, "sample": SMALL_SAMPLING})
PRESETS["small"] = Preset("Tables 1 and 2 at 64 px with the bundled autoencoder", MEASURED, {"table": {
    **SMALL_SPACE, "models": list(SMALL_RATES), "model_preset": "small", "epochs": SMALL_TRAINING["epochs"],
    "batch": SMALL_TRAINING["global_batch_size"], "validate_every": SMALL_TRAINING["epochs"],
    "steps": SMALL_SAMPLING["num_sampling_steps"], "sampler": SMALL_SAMPLING["sampler"], "features": ["retina"],
    "lpips": "none", "classify_size": SMALL_SPACE["image_size"], "classify_epochs": 20}})


@dataclass(frozen=True)
class Section:
    """A preset as one script sees it."""

    description: str
    source: str
    settings: dict  # flag, with underscores -> value


def presets_of(*sections):
    """Name -> Section of every preset that says something to a script that reads these sections."""
    return {name: Section(preset.description, preset.source,
                          {flag: value for s in sections for flag, value in preset.settings.get(s, {}).items()})
            for name, preset in PRESETS.items() if preset.settings.keys() & {*sections}}
