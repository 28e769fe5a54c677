"""The networks of an evaluation, all opened before any slow work: feature spaces, LPIPS, a classifier."""

from classification.network import load_classifier
from core.errors import UserError
from evaluation.features import PUBLISHED, open_features
from evaluation.lpips import Lpips, check_image_size

SPACE, GG_SPACE = "inception", "dino"  # as in the paper


class Networks:
    """`compared`: names of the spaces of KID and FID; `gg`: that of GG; `spaces`: name -> copies, one on each device.

    `lpips` and `classifier` are None where they are not asked for.
    """

    def __init__(self, devices, features=None, gg_extractor=None, lpips="none", classifier=None, label_names=(),
                 image_size=None):
        """Open what the flags of evaluate.py name. Raises UserError.

        features: names of spaces (None: as in the paper); gg_extractor: name of one (None: as in the paper or, with
        `features`, the first of them); lpips: alex, alex=FILE or none; classifier: a file of classify.py, which must
        know the labels `label_names`; image_size: that of the images.
        """
        names = features or [SPACE]
        gg_name = gg_extractor or (GG_SPACE if features is None else names[0])
        self.devices, self.spaces = devices, {}
        self.compared = [self._open(name, "--features") for name in names]
        if len(set(self.compared)) < len(self.compared):
            twice = next(name for name in self.compared if self.compared.count(name) > 1)
            raise UserError(f"--features: two spaces are called {twice}; remove or rename one")
        self.gg = self._open(PUBLISHED.get(gg_name, gg_name), "--gg-extractor")
        self.lpips = _open_lpips(lpips, devices[0], image_size)
        self.classifier = _open_classifier(classifier, devices[0], label_names) if classifier else None

    def _open(self, name, flag):
        """Open a space on every device -> its short name."""
        try:
            copies = [open_features(name, device) for device in self.devices]
        except UserError as error:
            raise UserError(str(error).replace("--features", flag)) from None
        known = self.spaces.setdefault(copies[0].name, copies)
        if known[0].identity != copies[0].identity:
            raise UserError(f"{flag} {name}: another network is called {copies[0].name} too; rename one of the files")
        return copies[0].name

    def about(self):
        """Name -> identity and preprocessing, for results.json."""
        networks = {name: copies[0] for name, copies in self.spaces.items()}
        if self.lpips:
            networks["lpips"] = self.lpips
        about = {name: {"identity": network.identity, "preprocessing": network.preprocessing}
                 for name, network in networks.items()}
        if self.classifier:
            about["classifier"] = {"identity": self.classifier.identity,
                                   "preprocessing": f"central crop to {self.classifier.image_size} pixels"}
        return about


def _open_lpips(text, device, image_size):
    """`alex`, `alex=FILE` or `none` -> the distance, or None."""
    if text == "none":
        return None
    net, equals, file = text.partition("=")
    if net != "alex" or (equals and not file):
        raise UserError(f"--lpips {text}: expected alex, alex=FILE or none")
    check_image_size(image_size)
    return Lpips(device, file or None)


def _open_classifier(file, device, label_names):
    classifier = load_classifier(file, device)
    if classifier.label_names != tuple(label_names):
        raise UserError(f"--classifier {file}: knows {' '.join(classifier.label_names)}, "
                        f"expected the labels of --real: {' '.join(label_names)}")
    return classifier
