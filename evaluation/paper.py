"""The numbers of the paper's tables (arXiv 2407.03018), for tables that show them beside ours."""

SOURCE = "arXiv 2407.03018"

# Table 1: (mean, spread). KID in 1e-3 on Inception features, LPIPS of AlexNet, GG on DINOv2 features.
PARAMETERS = {"LDM-B": 17.3, "DiT-S": 32.7, "GeCA-S": 13.3}  # millions; the order of the rows
TABLE_1 = {
    "Fundus": {
        "LDM-B": {"kid": (11.64, 2.1), "lpips": (0.37, 0.09), "gg": (-10.67, None)},
        "DiT-S": {"kid": (12.45, 2.8), "lpips": (0.31, 0.09), "gg": (-14.55, None)},
        "GeCA-S": {"kid": (7.42, 1.6), "lpips": (0.39, 0.11), "gg": (2.02, None)},
    },
    "OCT": {
        "LDM-B": {"kid": (64.5, 10), "lpips": (0.39, 0.16), "gg": (-2.31, None)},
        "DiT-S": {"kid": (62.3, 5.9), "lpips": (0.37, 0.14), "gg": (-0.44, None)},
        "GeCA-S": {"kid": (49.1, 8.0), "lpips": (0.53, 0.16), "gg": (0.34, None)},
    },
}

# Table 2: per cent, mean and standard deviation over folds; the last column is the stars against the first row.
BASELINE, WITHOUT = "Baseline (geometric aug.)", "Baseline w/o aug."
TABLE_2 = {  # Sen, Spe, AUC, F1, F1(sen/spe), mAP
    BASELINE: ((54.66, 1.53), (96.50, 0.16), (92.47, 0.85), (55.47, 0.99), (60.80, 1.49), (68.85, 1.41), "–"),
    WITHOUT: ((48.34, 1.45), (96.39, 0.20), (89.99, 0.82), (54.56, 1.77), (50.07, 0.89), (64.58, 1.19), "**"),
    "LDM-B": ((58.83, 1.90), (96.12, 0.29), (91.22, 0.74), (59.65, 3.19), (67.74, 2.97), (70.49, 2.64), "**"),
    "DiT-S": ((59.25, 4.54), (95.87, 0.37), (91.80, 1.74), (59.11, 2.57), (67.13, 4.87), (69.89, 3.34), "***"),
    "GeCA-S": ((59.95, 5.32), (96.38, 0.40), (92.74, 2.21), (61.62, 3.93), (68.38, 4.61), (73.28, 5.58), "****"),
}
